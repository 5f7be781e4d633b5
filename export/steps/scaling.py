"""An equal network whose results lie well inside float16's range: layers are divided by powers of two.

A power of two changes no digit of a number, and a network of convolutions, ReLUs and maxima passes a positive factor on
from layer to layer: what one convolution is divided by, the weights of the next are multiplied by.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from export.steps.graph import constants

if TYPE_CHECKING:
    from collections.abc import Mapping

    import onnx
    from numpy.typing import NDArray

# Other slices may go higher than those that the peaks were measured on: an eighth of the range is left free. Below
# the other end, a layer's smaller results would lose digits.
HIGHEST, LOWEST, AIM = 65504 / 8, 1 / 16, 16.0


def factors(peaks: Mapping[str, float]) -> dict[str, float]:
    """What to divide layers by, so that their peaks come near to 16; those that need no change are left out.

    Args:
        peaks: largest absolute result of each node, measured in float32; see `HalfArithmetic.peaks`.
    """
    return {
        name: 2.0 ** round(math.log2(peak / AIM))
        for name, peak in peaks.items()
        if name.endswith("/Conv")
        and not name.startswith("logits/")
        and 0 < peak < math.inf
        and not LOWEST <= peak <= HIGHEST
    }


def divided(model: onnx.ModelProto, by: Mapping[str, float]) -> onnx.ModelProto:
    """The same function with the results of some convolutions divided; ``model`` stays as it is.

    Args:
        model: the float32 graph that ``export.steps.to_onnx.convert`` made.
        by: positive factors by the convolution's name.

    Raises:
        ExportError: a factor would reach a node that does not pass it on.
    """
    from onnx import numpy_helper

    copy = type(model).FromString(model.SerializeToString())
    values = constants(copy)
    # By tensor, what each of its channels was divided by.
    scales: dict[str, NDArray[np.float64]] = {}
    for node in copy.graph.node:
        incoming = [scales[name] for name in node.input if name in scales]
        scales[node.output[0]] = _pass_on(node, incoming, by.get(node.name, 1.0), values)
    for stored in copy.graph.initializer:
        kept = np.asarray(values[stored.name], numpy_helper.to_array(stored).dtype)
        stored.CopyFrom(numpy_helper.from_array(kept, stored.name))
    return copy


def _pass_on(
    node: Any, incoming: list[NDArray[np.float64]], factor: float, values: dict[str, Any]
) -> NDArray[np.float64]:
    """What a node's channels are divided by; a convolution's weights change with it."""
    if node.op_type == "Conv":
        weights, bias = node.input[1:]
        if incoming:
            values[weights] = values[weights] * incoming[0][None, :, None, None]
        values[weights], values[bias] = values[weights] / factor, values[bias] / factor
        return np.full(len(values[bias]), factor)
    if not incoming:
        return np.ones(1)
    if node.op_type == "Concat":
        return np.concatenate(incoming)
    if node.op_type == "DepthToSpace":
        return incoming[0][: len(incoming[0]) // 4]
    if node.op_type in ("MaxPool", "Relu", "Slice") or np.all(incoming[0] == 1):
        return incoming[0]
    raise ExportError(f"{node.name} cannot be given results that are divided: report this network")
