"""MRC volumes, the format of IMOD and of electron tomography."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from unet.volume.arrays import ArrayVolume
from unet.volume.limits import IMAGE_LIMITS, StackError
from unet.volume.volume import FileIdentity

if TYPE_CHECKING:
    from pathlib import Path

    from unet.volume.limits import Limits

_MAGIC, _MAGIC_AT = b"MAP", 208
# IMOD's mark in the header, and the flag without which its bytes have no sign.
_IMOD, _IMOD_AT, _SIGNED = 1146047817, 10, 1


def is_mrc(start: bytes) -> bool:
    """Whether a file that begins so is MRC."""
    return start[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] == _MAGIC


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
                self._file = mrcfile.mmap(path, mode="r", permissive=True)
            data, header = self._file.data, self._file.header
            if data is None:
                raise ValueError("no pixels")
        except (ValueError, OSError, RuntimeError) as error:
            raise StackError(f"{path} is truncated or damaged ({error}): copy or download it again") from error
        stamp, flags = np.frombuffer(bytes(header["extra2"]), np.int32)[_IMOD_AT : _IMOD_AT + 2]
        if data.dtype == np.int8 and stamp == _IMOD and not flags & _SIGNED:
            data = data.view(np.uint8)
        axes = ["z", "y", "x"][-data.ndim :] if data.ndim <= 3 else ["t", "z", "y", "x"]
        super().__init__(path, data, axes, limits, (1,) * data.ndim)
        sizes: dict[str, Any] = {}
        for axis in "xyz"[: data.ndim]:
            step = float(self._file.voxel_size[axis])
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
        """Close the file."""
        self._file.close()
