"""MRC volumes, the format of IMOD and of electron tomography."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from unet.volume.arrays import ArrayVolume
from unet.volume.limits import IMAGE_LIMITS, StackError
from unet.volume.volume import FileIdentity

if TYPE_CHECKING:
    from pathlib import Path

    from unet.volume.limits import Limits

_MAGIC, _MAGIC_AT = b"MAP", 208
# IMOD's mark in the header, and the flag without which its bytes have no sign.
_IMOD, _IMOD_AT, _SIGNED = 1146047817, 10, 1


# MRC2014: the header's size, where it has the extended header's size and the machine stamp, and a big-endian stamp.
_HEADER, _EXTENDED_AT, _STAMP_AT, _BIG_ENDIAN = 1024, 92, 212, 0x11


def is_mrc(start: bytes) -> bool:
    """Whether a file that begins so is MRC."""
    return start[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


class _Pixels:
    """The pixels of a file; what is asked for is mapped, copied and let go, so that no memory counts for the others."""

    def __init__(self, path: Path, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> None:
        self._path, self.dtype, self._offset, self.shape = path, dtype, offset, shape

    def __getitem__(self, index: tuple[Any, ...]) -> npt.NDArray[Any]:
        return np.array(np.memmap(self._path, self.dtype, "r", self._offset, self.shape)[index])


def _check_extended_header(path: Path) -> None:
    """Refuse an extended header that is longer than the file: mrcfile would reserve memory for it, up to 4 GiB.

    Raises:
        ValueError: saying so.
    """
    with path.open("rb") as file:
        start = file.read(_HEADER)
    order: Literal["big", "little"] = "big" if start[_STAMP_AT : _STAMP_AT + 1] == bytes([_BIG_ENDIAN]) else "little"
    length = int.from_bytes(start[_EXTENDED_AT : _EXTENDED_AT + 4], order)
    if _HEADER + length > path.stat().st_size:
        raise ValueError(f"its extended header of {length} bytes goes beyond its end")


class MrcStack(ArrayVolume):
    """An MRC file as a sequence of grey slices; rows are in the file's order, which IMOD shows from the bottom up."""

    def __init__(self, path: Path, limits: Limits = IMAGE_LIMITS) -> None:
        """Open and check a volume.

        Raises:
            StackError: if it cannot be read.
        """
        try:
            import mrcfile
        except ImportError as error:
            raise StackError("mrcfile is not installed: pip install 'unet-medical-triton[mrc]'") from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of headers that older programs write
                _check_extended_header(path)
                with mrcfile.mmap(path, mode="r", permissive=True) as file:
                    data, header, voxel = file.data, file.header, file.voxel_size.copy()
                    if data is None:
                        raise ValueError("no pixels")
                    pixels = _Pixels(path, data.dtype, data.offset, data.shape)
        except (ValueError, OSError, RuntimeError) as error:
            raise StackError(f"{path} is truncated or damaged ({error}): copy or download it again") from error
        stamp, flags = np.frombuffer(bytes(header["extra2"]), np.int32)[_IMOD_AT : _IMOD_AT + 2]
        if pixels.dtype == np.int8 and stamp == _IMOD and not flags & _SIGNED:
            pixels.dtype = np.dtype(np.uint8)
        count = len(pixels.shape)
        super().__init__(path, pixels, ["t", "z", "y", "x"][-count:], limits, (1,) * count)
        sizes: dict[str, Any] = {}
        for axis in "xyz"[:count]:
            step = float(voxel[axis])
            if 0 < step < np.inf:
                sizes.update({f"PhysicalSize{axis.upper()}": step / 10, f"PhysicalSize{axis.upper()}Unit": "nm"})
        self.metadata = self.described(sizes)
        self._identity = FileIdentity(path)

    def fingerprint(self) -> dict[str, Any]:
        """The file's size and SHA-256."""
        return self._identity.fingerprint()

    def changed(self) -> bool:
        """Whether the file was written to or replaced since it was opened."""
        return self._identity.changed()

    def close(self) -> None:
        """Nothing is held open."""
