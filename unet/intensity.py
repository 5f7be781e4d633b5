"""The one normalisation of intensities, the same in the trainer, the exported graph and the client."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError

Window = tuple[float, float]

_BLOCK_PX = 2**22


class IntensityError(UnetError):
    """Intensities that cannot be brought to 8 bits."""


def normalise(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Raw uint8 intensities of any shape to float32 in [-1, 1]: x / 127.5 - 1.

    The division is a multiplication by the float32 nearest to 1 / 127.5, as it is in the exported graph.
    """
    return image.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(image: npt.NDArray[Any], window: Window | None = None) -> npt.NDArray[np.uint8]:
    """Bring intensities to 8 bits.

    Args:
        image: uint8 or uint16, any shape.
        window: the intensities that become 0 and 255; between them the map is linear, beyond them clipped.
            Without one uint8 stays as it is, the same array.

    Raises:
        IntensityError: if the image is of another dtype, uint16 comes without a window, or the window is empty.
    """
    _check_dtype(image)
    if window is None:
        if image.dtype != np.uint8:
            raise IntensityError(f"{image.dtype} intensities need a window, the two values that become 0 and 255")
        return image
    low, high = window
    if not -np.inf < low < high < np.inf:
        raise IntensityError(f"the intensity window {low:g} to {high:g} is empty: its second value must be the larger")
    scaled = (image.astype(np.float32) - np.float32(low)) * np.float32(255 / (high - low))
    result: npt.NDArray[np.uint8] = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return result


def window_of(stack: Iterable[npt.NDArray[Any]], low: float = 0.1, high: float = 99.9) -> Window:
    """The intensities at two percentiles of a whole stack, found slice by slice from its histogram.

    Args:
        stack: uint8 or uint16 slices.
        low: percentile that is to become 0.
        high: percentile that is to become 255.

    Raises:
        IntensityError: if the stack has no pixels, or others than uint8 and uint16.
    """
    counts = np.zeros(2**16, np.int64)
    for image in stack:
        _check_dtype(image)
        flat = image.ravel()
        # bincount works on 8-byte copies: block by block a large slice does not take eight times its size.
        for first in range(0, flat.size, _BLOCK_PX):
            counts += np.bincount(flat[first : first + _BLOCK_PX], minlength=counts.size)
    total = counts.sum()
    if total == 0:
        raise IntensityError("a stack without pixels has no intensity window")
    below = np.cumsum(counts)
    first = int(np.searchsorted(below, total * low / 100, side="right"))
    last = int(np.searchsorted(below, total * high / 100, side="left"))
    # A flat stack has one intensity; a window of one step keeps it.
    return float(first), float(max(last, first + 1))


def _check_dtype(image: npt.NDArray[Any]) -> None:
    if image.dtype not in (np.uint8, np.uint16):
        raise IntensityError(f"{image.dtype} intensities cannot be read: convert the stack to 8- or 16-bit grey")
