"""INT8 for CPUs: ``export/main.py --int8`` offers an engine whose convolutions compute in 8-bit integers.

NNCF quantises the network after training: the ranges of activations are taken from slices that training saw. Scores of
slices that it did not see decide whether the engine is offered, as for every other one.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from unet.cpu_engine import INPUT, IR_ENTRIES
from unet.errors import UnetError
from unet.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray


class QuantisationError(UnetError):
    """A network that cannot be quantised here."""


def quantise(model: Path, calibration: Sequence[NDArray[np.uint8]], path: Path) -> None:
    """Quantise an ONNX file to OpenVINO's own format with 8-bit weights and activations.

    Args:
        model: the float32 ONNX file.
        calibration: tiles, uint8 [1, 1, S, S] each, of slices that training saw.
        path: file to write: both parts of OpenVINO's format in one uncompressed ZIP.

    Raises:
        QuantisationError: NNCF is not installed, or there is nothing to calibrate on.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise QuantisationError(
            f"INT8 needs NNCF ({error}): pip install 'unet-medical-triton[int8]', or leave --int8 out"
        ) from error
    if not calibration:
        raise QuantisationError("there are no tiles to calibrate INT8 on: name the training stacks with --data_dir")
    nncf.set_log_level(40)
    network = openvino.Core().read_model(model)
    data = nncf.Dataset([{INPUT: tile} for tile in calibration])
    # It draws bars whether or not somebody watches.
    with contextlib.redirect_stdout(io.StringIO()):
        quantised = nncf.quantize(network, data, subset_size=len(calibration))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, atomic_file(path) as aside:
        openvino.save_model(quantised, str(Path(folder) / IR_ENTRIES[0]), compress_to_fp16=False)
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as packed:
            for name in IR_ENTRIES:
                # A fixed time: the same network gives the same bytes.
                packed.writestr(zipfile.ZipInfo(name), (Path(folder) / name).read_bytes())
