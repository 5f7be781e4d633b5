"""ONNX in float32 to ONNX in float16 throughout, as a strongly typed TensorRT network wants it.

Casting alone would lose accuracy at both ends of the network; there the graph is rewritten to an equal one first:

* In: ``x / 127.5 - 1`` is rounded in float16, and so is its scale. ``(x - 127.5) / 128`` is exact for every uint8
  (at most 8 significant bits; exact in bfloat16 too), and the factor 128 / 127.5 goes into the first weights.
* Out: the probability depends on the difference of two logits, which cancels their leading digits. As
  ``softmax(l)[1] = sigmoid(l1 - l0)``, the last 1x1 convolution computes the difference itself, from weights
  subtracted in float64. A sigmoid cannot overflow to NaN.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.steps.graph import check_graph, constants, read_model, write_model
from export.steps.scaling import divided
from unet.errors import command, say
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx

CENTRE, SPAN = 127.5, 128.0
LARGEST = float(np.finfo(np.float16).max)


def to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The float16 form of a graph that ``export.steps.to_onnx.convert`` made; ``model`` stays as it is.

    Raises:
        ExportError: the graph does not begin or end as expected, a weight is beyond float16's range, or the result is
            not float16 throughout.
    """
    half = type(model).FromString(model.SerializeToString())
    values = constants(half)
    _normalise_exactly(half.graph, values)
    _single_plane(half.graph, values)
    _cast(half, values)
    check_graph(half, half=True)
    return half


def _normalise_exactly(graph: Any, values: dict[str, Any]) -> None:
    nodes = _chain(graph, INPUT, ("Cast", "Mul", "Sub", "Conv"))
    scale, offset = (float(values[node.input[1]].item()) for node in nodes[1:3])
    if abs(offset / scale - CENTRE) > 1e-3:
        raise ExportError(f"the graph maps {offset / scale:.4g} to 0, not {CENTRE}: export it again")
    weights = nodes[3].input[1]
    values[weights] = values[weights].astype(np.float64) * (SPAN * scale)
    nodes[1].op_type, nodes[2].op_type = "Sub", "Mul"
    nodes[1].name, nodes[2].name = "centre", "shrink"
    for node, value in ((nodes[1], CENTRE), (nodes[2], 1 / SPAN)):
        values[node.input[1]] = np.full_like(values[node.input[1]], value)


def _single_plane(graph: Any, values: dict[str, Any]) -> None:
    relu = next(node.output[0] for node in reversed(graph.node) if node.op_type == "Relu")
    conv, softmax, plane, cast = _chain(graph, relu, ("Conv", "Softmax", "Slice", "Cast"))
    for name in conv.input[1:]:
        if values[name].shape[0] != 2:
            raise ExportError(f"{conv.name} has {values[name].shape[0]} classes where 2 are due: export it again")
        logits = values[name].astype(np.float64)
        values[name] = logits[1:] - logits[:1]
    softmax.op_type, softmax.name = "Sigmoid", "Sigmoid"
    del softmax.attribute[:]
    softmax.output[0] = OUTPUT
    for name in plane.input[1:]:
        if not any(name in node.input for node in graph.node if node is not plane and node.name != plane.name):
            values.pop(name, None)
    graph.node.remove(plane)
    graph.node.remove(cast)


def _chain(graph: Any, start: str, ops: Sequence[str]) -> list[Any]:
    """The nodes that follow each other from tensor ``start``, which must have these operators."""
    found: list[Any] = []
    for op in ops:
        readers = [node for node in graph.node if start in node.input]
        if len(readers) != 1 or readers[0].op_type != op:
            names = ", ".join(node.op_type for node in readers) or "nothing"
            raise ExportError(f"{names} follows {start} where {op} is due: export the SavedModel again")
        found.append(readers[0])
        start = readers[0].output[0]
    return found


def _cast(model: onnx.ModelProto, values: dict[str, Any]) -> None:
    import onnx
    from onnx import numpy_helper

    names = [i.name for i in model.graph.initializer if i.name in values]
    del model.graph.initializer[:]
    for name in names:
        value = values[name]
        if np.issubdtype(value.dtype, np.floating):
            largest = float(np.max(np.abs(value)))
            if not largest <= LARGEST:
                raise ExportError(
                    f"{name} holds {largest:.3g}, beyond float16's {LARGEST:.0f}: train with more weight decay"
                )
            value = value.astype(np.float16)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = onnx.TensorProto.FLOAT16


def _factor(text: str) -> tuple[str, float]:
    layer, _, factor = text.rpartition("=")
    return layer, float(factor)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert an ONNX file from the command line."""
    parser = argparse.ArgumentParser(
        prog="export.steps.half_precision", description="Bring an exported ONNX file to float16, unproven."
    )
    parser.add_argument("model", type=Path, help="ONNX file in float32, from export.steps.to_onnx")
    parser.add_argument("out", type=Path, help="ONNX file to write")
    parser.add_argument(
        "--divide",
        type=_factor,
        nargs="+",
        default=[],
        metavar="LAYER=FACTOR",
        help="results to divide first, an equal function, so that they fit float16's range",
    )
    args = parser.parse_args(argv)
    write_model(to_half(divided(read_model(args.model), dict(args.divide))), args.out)
    say(str(args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
