"""Any volume that can be read, opened by what it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy.typing as npt

from unet.volume.ome_zarr import ZarrStack, is_zarr
from unet.volume.tiff.reader import StackReader

if TYPE_CHECKING:
    from collections.abc import Iterator

Volume = Union[StackReader, ZarrStack]
# Of pixels that are read at once where nothing else bounds it.
BLOCK_PX = 2**22


def open_volume(path: Path) -> Volume:
    """Open a TIFF stack or an OME-Zarr volume.

    Raises:
        StackError: if it cannot be read.
    """
    return ZarrStack(path) if is_zarr(path) else StackReader(path)


def blocks(volume: Volume) -> Iterator[npt.NDArray[Any]]:
    """All pixels, by blocks of rows."""
    rows = max(1, BLOCK_PX // volume.width)
    for page in range(len(volume)):
        for row0 in range(0, volume.height, rows):
            yield volume.rows(page, row0, min(volume.height, row0 + rows))
