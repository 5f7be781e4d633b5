"""The float16 graph computed in float16, on a CPU: what a GPU's tensor cores make of it.

Neither ONNX Runtime nor OpenVINO computes in float16 on a CPU: both widen a float16 graph to float32, where nothing
overflows and nothing is rounded on the way. Here the result of every node is rounded to float16. Sums accumulate in
float32, as they do in tensor cores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ParityError
from unet.machine import thread_limit
from unet.names import INPUT

if TYPE_CHECKING:
    import onnx
    from numpy.typing import NDArray

LARGEST = float(np.finfo(np.float16).max)
# All others move values or choose among them: there is nothing to round.
_COMPUTE = frozenset({"Conv", "Mul", "Sigmoid", "Softmax", "Sub"})


class HalfArithmetic:
    """A graph of the exporter, run node by node.

    Args:
        model: the float16 graph, or the float32 one.
        rounded: whether each result is rounded to float16; False only measures the peaks.

    Attributes:
        peaks: largest absolute result of each computing node over all tiles so far, before it is rounded; by the
            node's name, in the graph's order. Infinite or NaN where a former node overflowed.
    """

    def __init__(self, model: onnx.ModelProto, *, rounded: bool = True) -> None:
        import onnxruntime

        probed = _probed(model, rounded)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = thread_limit() or 0
        self._session = onnxruntime.InferenceSession(
            probed.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._rounded = rounded
        self._outputs = [output.name for output in probed.graph.output]
        self.peaks = {name.rpartition("/")[0]: 0.0 for name in self._outputs[1:]}

    def infer(self, image: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Segment tiles one at a time: uint8 [N, 1, S, S] to float16 [N, 1, S - 184, S - 184].

        Raises:
            ParityError: a result is beyond float16's range, or NaN, and was to be rounded.
        """
        return np.concatenate([self._run(image[index : index + 1]) for index in range(len(image))])

    def _run(self, tile: NDArray[np.uint8]) -> NDArray[np.float16]:
        output, *extremes = self._session.run(self._outputs, {INPUT: tile})
        for name, value in zip(self._outputs[1:], extremes):
            node = name.rpartition("/")[0]
            # Unlike `max`, this keeps a NaN.
            self.peaks[node] = float(np.maximum(self.peaks[node], np.abs(value)))
        if self._rounded:
            self._check()
        result: NDArray[np.float16] = np.asarray(output, np.float16)
        return result

    def _check(self) -> None:
        for node, peak in self.peaks.items():
            if not peak <= LARGEST:
                raise ParityError(
                    f"computed in float16, {node} overflows: it reaches {peak:.3g}, float16 ends at {LARGEST:.0f}; "
                    "train with more weight decay"
                )


def _probed(model: onnx.ModelProto, rounded: bool) -> onnx.ModelProto:
    """The same graph in float32, with the extremes of each computing node as outputs after the probability."""
    import onnx
    from onnx import helper, numpy_helper

    kind = onnx.TensorProto
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    graph = copy.graph
    for stored in graph.initializer:
        if stored.data_type == kind.FLOAT16:
            stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).astype(np.float32), stored.name))
    nodes: list[Any] = []
    extremes: list[str] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type == "Cast":
            node.attribute[0].i = kind.FLOAT
        if node.op_type not in _COMPUTE:
            continue
        final, exact = node.output[0], f"{node.output[0]}/exact"
        node.output[0] = exact
        for extreme in ("ReduceMax", "ReduceMin"):
            extremes.append(f"{node.name}/{extreme}")
            nodes.append(helper.make_node(extreme, [exact], [extremes[-1]], keepdims=0))
        if rounded:
            nodes.append(helper.make_node("Cast", [exact], [f"{final}/half"], to=kind.FLOAT16))
            nodes.append(helper.make_node("Cast", [f"{final}/half"], [final], to=kind.FLOAT))
        else:
            nodes.append(helper.make_node("Identity", [exact], [final]))
    del graph.node[:]
    graph.node.extend(nodes)
    graph.output[0].type.tensor_type.elem_type = kind.FLOAT
    graph.output.extend(helper.make_tensor_value_info(name, kind.FLOAT, []) for name in extremes)
    return copy
