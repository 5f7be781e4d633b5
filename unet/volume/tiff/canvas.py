"""Stacks out in any order: a TIFF whose whole layout and description stand before its first pixel does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tifffile

from unet.files import fsync, naming
from unet.volume.limits import StackError
from unet.volume.metadata import StackMetadata, describe
from unet.volume.tiff.checks import CLASSIC_TIFF_BYTES

if TYPE_CHECKING:
    from types import TracebackType

_DTYPES = ("float32", "uint8", "uint16", "uint32")


class StackCanvas:
    """A TIFF stack of known size, written by blocks of rows in any order; what is not written reads as 0.

    Unlike ``StackWriter`` it writes straight to ``path``: whoever uses it makes it appear under its final name.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        kept: StackMetadata,
        shape: tuple[int, int, int],
        dtype: npt.DTypeLike,
        *,
        samples: int = 1,
        software: str | None = None,
    ) -> None:
        """Lay the file out; one that is there already is replaced.

        Args:
            path: the file.
            kept: whose pixel size, unit, axes and flavour to keep.
            shape: slices, rows and columns.
            dtype: of the pixels, float32, uint8, uint16 or uint32.
            samples: 1 for grey, 3 for red, green and blue.
            software: text for the tag of that name, which says how the file was made; ASCII.

        Raises:
            StackError: if the dtype is another.
        """
        self.path, self.shape, self.dtype, self.samples = Path(path), shape, np.dtype(dtype), samples
        if self.dtype.name not in _DTYPES:
            raise StackError(f"{self.path} cannot hold {self.dtype} pixels: write {', '.join(_DTYPES)}")
        whole = shape if samples == 1 else (*shape, samples)
        self._row_bytes = shape[2] * samples * self.dtype.itemsize
        options: dict[str, Any] = {"photometric": "minisblack" if samples == 1 else "rgb", "metadata": None}
        if samples > 1:
            options["planarconfig"] = "contig"
        if kept.resolution is not None:
            options.update(resolution=kept.resolution, resolutionunit=kept.resolution_unit)
        text = describe(kept, shape[0], shape[1:], self.dtype, samples)
        if text is not None:
            options["description"] = text.encode()
        large = int(np.prod(whole, dtype=object)) * self.dtype.itemsize > CLASSIC_TIFF_BYTES
        with naming(self.path), tifffile.TiffWriter(self.path, bigtiff=large, byteorder="<") as tiff:
            place = tiff.write(
                None, shape=whole, dtype=self.dtype, software=software, returnoffset=True, contiguous=True, **options
            )
        assert place is not None
        self._offset = int(place[0])
        self._descriptor = os.open(self.path, os.O_RDWR)

    def write(self, page: int, row0: int, rows: npt.NDArray[Any]) -> None:
        """Write rows from ``row0`` on of slice ``page``: [R, width], or [R, width, 3] in colour."""
        stored = np.ascontiguousarray(rows, self.dtype.newbyteorder("<"))
        with naming(self.path):
            write_all(self._descriptor, stored, self._place(page, row0))

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page`` as they were written."""
        shape = (row1 - row0, self.shape[2]) if self.samples == 1 else (row1 - row0, self.shape[2], self.samples)
        raw = os.pread(self._descriptor, (row1 - row0) * self._row_bytes, self._place(page, row0))
        return np.frombuffer(raw, self.dtype.newbyteorder("<")).reshape(shape)

    def _place(self, page: int, row: int) -> int:
        return self._offset + (page * self.shape[1] + row) * self._row_bytes

    def close(self) -> None:
        """Have the file's bytes on the disk and close it."""
        try:
            with naming(self.path):
                fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def __enter__(self) -> StackCanvas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def append_all(descriptor: int, content: bytes) -> None:
    """Write bytes at an open file's place; the system may take them in pieces."""
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def write_all(descriptor: int, pixels: npt.NDArray[Any], offset: int) -> None:
    """Write a C-contiguous array at a place in a file; the system may take it in pieces."""
    left = pixels.data.cast("B")
    while left:
        written = os.pwrite(descriptor, left, offset)
        left, offset = left[written:], offset + written
