"""Any volume that can be read, opened by what it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from unet.volume.limits import IMAGE_LIMITS, Limits
from unet.volume.ome_zarr import ZarrStack, is_zarr
from unet.volume.tiff.reader import StackReader

if TYPE_CHECKING:
    from unet.volume.volume import Volume


def open_volume(path: str | os.PathLike[str], limits: Limits = IMAGE_LIMITS) -> Volume:
    """Open a TIFF stack or an OME-Zarr volume.

    Raises:
        StackError: if it cannot be read, or declares something unfit.
    """
    return ZarrStack(path, limits) if is_zarr(Path(path)) else StackReader(path, limits)
