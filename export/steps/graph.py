"""What an exported graph may contain, and how its parts are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from unet.files import atomic_file
from unet.machine import thread_limit
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import onnx
    from numpy.typing import NDArray

OPSET = 17
LOGITS = "logits"

# All are in the operator lists of TensorRT 10.4 and of OpenVINO. Operators that move data
# (Transpose) or compute shapes at run time (Shape, Loop, If, Gather, Pad ...) show that the conversion went wrong.
ALLOWED_OPS = frozenset(
    {"Cast", "Concat", "Conv", "DepthToSpace", "MaxPool", "Mul", "Relu", "Sigmoid", "Slice", "Softmax", "Sub"}
)


def read_model(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Read and check an ONNX file.

    Raises:
        ExportError: it is missing, or not a valid model.
    """
    import onnx

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror}): name an ONNX file") from error
    try:
        model = onnx.load_model_from_string(content)
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker share no base class
        raise ExportError(f"{path} is not a valid ONNX model: export it again") from error
    return model


def write_model(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write ``model``, whole or not at all; the same model gives the same bytes."""
    with atomic_file(path) as aside:
        aside.write_bytes(model.SerializeToString(deterministic=True))


def check_graph(model: onnx.ModelProto, *, half: bool) -> None:
    """Refuse a graph with foreign operators, another interface, twice stored weights or stray types.

    Args:
        model: the graph.
        half: whether it must compute in float16 throughout, else in float32.

    Raises:
        ExportError: with the first fault found.
    """
    import onnx

    graph = model.graph
    foreign = sorted({node.op_type for node in graph.node} - ALLOWED_OPS)
    if foreign:
        raise ExportError(
            f"the graph has the operators {', '.join(foreign)}, which must not be in it: report this network"
        )
    _check_interface(graph)
    names = [i.name for i in graph.initializer]
    used = {name for node in graph.node for name in node.input}
    if len(set(names)) != len(names) or not set(names) <= used:
        raise ExportError("the graph stores weights twice or unused: report this network")
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    wanted, stray = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    if not half:
        wanted, stray = stray, wanted
    types = {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}
    types.update((i.name, i.data_type) for i in graph.initializer)
    wrong = sorted(name for name, kind in types.items() if kind == stray)
    if wrong or wanted not in types.values():
        kinds = onnx.TensorProto.DataType.Name
        raise ExportError(
            f"{', '.join(wrong[:3])} are {kinds(stray)} where {kinds(wanted)} is due: report this network"
        )


def _check_interface(graph: Any) -> None:
    import onnx

    found = [(v.name, v.type.tensor_type.elem_type, _fixed(v)) for v in (*graph.input, *graph.output)]
    fixed = [None, 1, None, None]
    expected = [(INPUT, onnx.TensorProto.UINT8, fixed), (OUTPUT, onnx.TensorProto.FLOAT16, fixed)]
    if found != expected:
        raise ExportError(f"the graph has the inputs and outputs {found} where {expected} are due: report this network")


def _fixed(value: Any) -> list[int | None]:
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def constants(model: onnx.ModelProto) -> dict[str, Any]:
    """The graph's constants by name, as arrays."""
    from onnx import numpy_helper

    return {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}


def base_filters(model: onnx.ModelProto) -> int:
    """Filters of the network's first convolution."""
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    return int(constants(model)[first.input[1]].shape[0])


def with_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same float32 graph with the softmax's input as a second output, ``logits`` [N, 2, H - 184, W - 184]."""
    import onnx

    copy = onnx.ModelProto.FromString(model.SerializeToString())
    softmax = next(node for node in copy.graph.node if node.op_type == "Softmax")
    for node in copy.graph.node:
        for field in (node.input, node.output):
            field[:] = [LOGITS if name == softmax.input[0] and node is not softmax else name for name in field]
    softmax.input[0] = LOGITS
    copy.graph.output.append(onnx.helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, ["N", 2, None, None]))
    return copy


def run_logits(model: onnx.ModelProto, batches: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    """The logits of tiles, [N, 1, S, S] each, by ONNX Runtime: float32 [N, 2, S - 184, S - 184] each."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_limit() or 0
    content = with_logits(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [session.run([LOGITS], {INPUT: batch})[0] for batch in batches]
