"""How much room on disks a run takes, and whether it is there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from unet.volume import ZarrStack

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serve.volume.request import Request
    from unet.volume import Volume

_LABEL_BYTES = {"uint16": 2, "uint32": 4}
_BYTES = {"probability": 4, "mask": 1, "labels3d": 4, "overlay": 3}


def require_space(wanted: Iterable[tuple[Volume, Request]], *, tta: bool) -> None:
    """Refuse what cannot end well for want of room; what is compressed, as OME-Zarr is, does not count.

    Args:
        wanted: volumes that are segmented one after the other, and what is wanted of each.
        tta: whether the probabilities of the run under way take four bytes each instead of two.

    Raises:
        ClientError: a disk has less than its outputs and the probabilities kept beside them take.
    """
    kept: dict[int, int] = {}
    largest: dict[int, int] = {}
    free: dict[int, tuple[int, Path]] = {}
    for volume, request in wanted:
        partial = request.partial_folder(volume.path)
        folder = next(path for path in partial.parents if path.exists())
        disk, pixels = folder.stat().st_dev, len(volume) * volume.height * volume.width
        free.setdefault(disk, (shutil.disk_usage(folder).free, folder))
        # What an interrupted run has laid out is there already.
        there = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file())
        each = sum(
            _LABEL_BYTES[request.label_dtype] if kind == "labels" else _BYTES[kind]
            for kind in request.kinds
            if kind == "overlay" or not isinstance(volume, ZarrStack)
        )
        kept[disk] = kept.get(disk, 0) + each * pixels - there
        if not (request.by_shards and isinstance(volume, ZarrStack)):  # shards are kept in the outputs alone
            largest[disk] = max(largest.get(disk, 0), (4 if tta else 2) * pixels)
    for disk, (room, folder) in free.items():
        need = kept[disk] + largest.get(disk, 0)
        if need > room:
            raise ClientError(
                f"{folder} has {room / 1e9:.1f} GB free, and this takes {need / 1e9:.1f} GB: free some space, or "
                "choose another --output_dir"
            )
