"""INT8 for CPUs: an engine whose convolutions compute in 8-bit integers.

NNCF quantises the network after training: the ranges of activations are taken from slices that training saw. Scores of
slices that it did not see decide whether the engine is taken, as for every other one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from unet.engine.cpu import IR_ENTRIES
from unet.files import atomic_file
from unet.names import INPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def can_quantise() -> bool:
    """Whether NNCF is installed."""
    return find_spec("nncf") is not None


def quantise(model: Path, calibration: Sequence[NDArray[np.uint8]], path: Path) -> None:
    """Quantise an ONNX file to OpenVINO's own format with 8-bit weights and activations.

    Args:
        model: the float32 ONNX file.
        calibration: tiles, uint8 [1, 1, S, S] each, of slices that training saw.
        path: file to write: both parts of OpenVINO's format in one uncompressed ZIP.

    Raises:
        ExportError: NNCF is not installed, or there is nothing to calibrate on.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise ExportError(
            f"INT8 needs NNCF ({error}): pip install 'unet-medical-triton[int8]', or export with --no_int8"
        ) from error
    if not calibration:
        raise ExportError("there are no tiles to calibrate INT8 on: name the training stacks with --data_dir")
    # Its own function sets the level of all handlers that the logger has, also of those that others gave it.
    logging.getLogger("nncf").setLevel(logging.ERROR)
    network = prepared(model)
    data = nncf.Dataset([{INPUT: tile} for tile in calibration])
    # It draws progress bars even where no terminal shows them.
    with contextlib.redirect_stdout(io.StringIO()):
        quantised = nncf.quantize(network, data, subset_size=len(calibration))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, atomic_file(path) as aside:
        openvino.save_model(quantised, str(Path(folder) / IR_ENTRIES[0]), compress_to_fp16=False)
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as packed:
            for name in IR_ENTRIES:
                # A fixed time: the same network gives the same bytes.
                packed.writestr(zipfile.ZipInfo(name), (Path(folder) / name).read_bytes())


def prepared(model: Path) -> Any:
    """The network of an ONNX file as OpenVINO's model: the same function, in the form that quantises best."""
    import openvino

    network = openvino.Core().read_model(model)
    _cut_by_strides(network)
    _convolve_up(network)
    network.validate_nodes_and_infer_types()
    return network


def _cut_by_strides(network: Any) -> None:
    """Turn every Slice into the StridedSlice of the same elements.

    NNCF knows that a StridedSlice only moves elements, and quantises a skip once, as it leaves its convolution. It
    quantises both the input and the output of a Slice, so that the convolution writes four bytes instead of one: a
    sixth of the time of a network of 16 filters.
    """
    from openvino import opset13

    for node in network.get_ordered_ops():
        if node.get_type_name() != "Slice":
            continue
        starts, stops, axes = (node.input_value(index).get_node().data for index in (1, 2, 4))
        rank = len(node.output(0).get_partial_shape())
        begin, end, keep_begin, keep_end = (np.zeros(rank, np.int64) for _ in range(4))
        keep_begin[:] = keep_end[:] = 1
        begin[axes], end[axes], keep_begin[axes] = starts, stops, 0
        # ONNX says "to the end" by the largest integer.
        keep_end[axes] = np.asarray(stops) == np.iinfo(np.int64).max
        cut = opset13.strided_slice(
            node.input_value(0), begin, end, np.ones(rank, np.int64), keep_begin.tolist(), keep_end.tolist()
        )
        cut.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(cut.output(0))


def _convolve_up(network: Any) -> None:
    """Turn every 1x1 convolution with depth-to-space back into the 2x2 transposed convolution that it stands for.

    OpenVINO computes that in one pass in 8-bit integers, which saves 5 % of the time of a network of 16 filters.
    """
    from openvino import opset13

    for node in network.get_ordered_ops():
        if node.get_type_name() != "DepthToSpace":
            continue
        biased = node.input_value(0).get_node()
        convolution = biased.input_value(0).get_node()
        weights, bias = _constant(convolution.input_value(1)), _constant(biased.input_value(1))
        # The output's channel c of row r and column k, of two each, is the convolution's channel (2 r + k) C + c.
        channels = len(weights) // 4
        kernel = weights.reshape(2, 2, channels, -1).transpose(3, 2, 0, 1)
        up = opset13.convolution_backprop_data(convolution.input_value(0), np.ascontiguousarray(kernel), [2, 2])
        up.set_friendly_name(convolution.get_friendly_name())
        # The bias is repeated for the four pixels.
        summed = opset13.add(up, bias.ravel()[:channels].reshape(1, channels, 1, 1))
        summed.set_friendly_name(node.get_friendly_name())
        node.output(0).replace(summed.output(0))


def _constant(port: Any) -> NDArray[np.float32]:
    """The constant that an input is, or is made of by changes of shape."""
    node = port.get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    return np.array(node.data)
