"""How much memory a pass of the network takes on a CPU, how much there is, and so how large a tile may be."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from unet.engine import EngineError
from unet.engine.cpu import EngineChoice
from unet.geometry import MIN_SIZE, is_valid_size

if TYPE_CHECKING:
    from collections.abc import Iterator

# Bytes for each pixel and each filter of the first level, rounded up from what was measured with 8, 16 and 64 filters
# and tiles of 572 to 2508 pixels: at most 9.3, 18.0 and 29.1. INT8 was not measured; it takes no more than f32.
_BYTES = {"openvino bf16": 10, "openvino f32": 20, "openvino int8": 20, "onnxruntime f32": 32}
# The tile itself, its answer, and their copies on the way.
_TILE_BYTES = 10
# Where the card does not say: the paper's network.
_FILTERS = 64
# What is left for all others.
_SHARE = 0.5

_MEMINFO, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
_MEMBERSHIP, _CGROUP = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_LIMITS = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))


def bytes_per_pixel(choice: EngineChoice, filters: int | None) -> int:
    """Memory that a pass of one tile takes, in bytes for each pixel of the tile.

    Args:
        choice: the engine and its number format.
        filters: of the network's first level; None where they are not known.
    """
    return _TILE_BYTES + _BYTES[str(choice)] * (filters or _FILTERS)


def largest_tile(memory: int, pixel_bytes: int) -> int:
    """The largest side of a tile, 188 + 16k, of which a pass fits half of some memory; at least the smallest side.

    Args:
        memory: in bytes.
        pixel_bytes: what a pass takes for each pixel.
    """
    side = max(math.isqrt(int(memory * _SHARE / pixel_bytes)), MIN_SIZE)
    while not is_valid_size(side):
        side -= 1
    return side


class TileLimit:
    """Refuses tiles that would have the system kill this process.

    Args:
        side: of the largest tile that is ever taken, in pixels.
        usual_side: of the largest tile that is taken without a look at the memory that is left.
        pixel_bytes: what a pass takes for each pixel, see `bytes_per_pixel`.
    """

    def __init__(self, side: int, usual_side: int, pixel_bytes: int) -> None:
        self._side, self._usual_side, self._pixel_bytes = side, usual_side, pixel_bytes
        self._own_bytes = _resident()

    def images_at_once(self, height: int, width: int) -> int:
        """How many tiles of this size one pass may hold; at least 1.

        Raises:
            EngineError: not even one.
        """
        if height * width > self._side**2:
            raise EngineError(
                f"a tile of {height} x {width} pixels is too large for this server's memory: send tiles of at most "
                f"{self._side} x {self._side}, the model's max_tile_size"
            )
        needed = height * width * self._pixel_bytes
        if max(height, width) > self._usual_side:
            # What former passes took is used again.
            left = free_memory() + max(0, _resident() - self._own_bytes)
            if needed > left:
                raise EngineError(
                    f"a tile of {height} x {width} pixels takes {needed >> 20} MiB, and this server has "
                    f"{left >> 20} MiB left: send smaller tiles"
                )
        return max(1, self._side**2 // (height * width))


def _resident() -> int:
    """Bytes of memory that this process holds."""
    return int(_STATM.read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def total_memory() -> int:
    """Bytes of memory that this process and its like may use at all: the machine's, or what its container grants."""
    return min([_meminfo("MemTotal"), *(limit for limit, _ in _groups())])


def free_memory() -> int:
    """Bytes of memory that this process can still get: what the machine has, and what its container grants."""
    return min([_meminfo("MemAvailable"), *(limit - used for limit, used in _groups())])


def _meminfo(name: str) -> int:
    for line in _MEMINFO.read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise OSError(f"{_MEMINFO} has no {name}")


def _groups() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of the control groups that hold this process, those above included."""
    for folder in _group_folders():
        for limit, used in _LIMITS:
            with contextlib.suppress(OSError, ValueError):  # "max" is no limit
                yield int((folder / limit).read_text()), int((folder / used).read_text()) - _reclaimable(folder)


def _group_folders() -> set[Path]:
    # In a container the group is at the root, whatever the kernel calls it outside.
    folders = {_CGROUP, _CGROUP / "memory"}
    with contextlib.suppress(OSError):
        for line in _MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                own = (_CGROUP / controllers / path.lstrip("/")).resolve()
                folders |= {folder for folder in (own, *own.parents) if _CGROUP in folder.parents}
    return folders


def _reclaimable(folder: Path) -> int:
    """Bytes of files that the group has read, which the kernel gives back when memory is short."""
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, value = line.split()
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0
