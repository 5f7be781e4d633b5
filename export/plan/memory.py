"""What a served plan takes of a GPU's memory, counted from the graph: an estimate until TensorRT itself says it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from unet.geometry import output_size
from unet.names import INPUT

if TYPE_CHECKING:
    import onnx

    from export.plan.settings import BuildSettings

_BYTES = {1: 4, 2: 1, 7: 8, 10: 2}  # float32, uint8, int64 and float16, by their ONNX numbers


def plan_memory(model: onnx.ModelProto, settings: BuildSettings) -> dict[str, int]:
    """What the card says of a plan's memory before there is a plan, in bytes.

    Triton makes one execution context for each profile and instance; all share the weights. Each context holds the
    activations of the largest profile, and as much scratch memory as a layer takes, up to the limit.
    """
    activations = max(activation_bytes(model, one.batches[2], one.tile_size) for one in settings.profiles)
    return {
        "weight_bytes": weight_bytes(model),
        "contexts_per_instance": len(settings.profiles),
        "activation_bytes_per_context": activations,
        "workspace_bytes_per_context_at_most": settings.workspace_bytes,
    }


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the stored weights; all contexts of a plan share them."""
    return sum(len(stored.raw_data) for stored in model.graph.initializer)


def activation_bytes(model: onnx.ModelProto, batch: int, tile_size: int) -> int:
    """Most bytes of results that are needed at the same time while a batch passes through the graph.

    A convolution with its ReLU counts once, and a concatenation copies nothing, as in TensorRT.

    Args:
        model: the float16 graph.
        batch: tiles in a pass.
        tile_size: their side.
    """
    sizes = _tensor_bytes(model, batch, tile_size)
    last_reader = {name: number for number, node in enumerate(model.graph.node) for name in node.input}
    live: dict[str, int] = {}
    most = 0
    for number, node in enumerate(model.graph.node):
        result = {node.output[0]: sizes[node.output[0]]}
        in_place = node.op_type in ("Concat", "Relu")
        if not in_place:
            most = max(most, sum(live.values()) + sum(result.values()))
        live = {name: size for name, size in live.items() if last_reader[name] > number} | result
        if in_place:
            most = max(most, sum(live.values()))
    return most


def _tensor_bytes(model: onnx.ModelProto, batch: int, tile_size: int) -> dict[str, int]:
    import onnx

    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for value, side in ((copy.graph.input[0], tile_size), (copy.graph.output[0], output_size(tile_size))):
        for dim, length in zip(value.type.tensor_type.shape.dim, (batch, 1, side, side)):
            dim.dim_value = length
    inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True).graph
    known: dict[str, Any] = {v.name: v.type.tensor_type for v in (*inferred.value_info, *inferred.output)}
    return {
        name: int(np.prod([d.dim_value for d in kind.shape.dim])) * _BYTES[kind.elem_type]
        for name, kind in known.items()
        if name != INPUT
    }
