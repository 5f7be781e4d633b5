"""Stacks out: page by page into a file that keeps the tags of the one it was made from."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from unet.files import atomic_file
from unet.volume.limits import StackError
from unet.volume.metadata import Described, StackMetadata, describe
from unet.volume.tiff.checks import CLASSIC_TIFF_BYTES

_DTYPES = ("float32", "uint8", "uint16")


class StackWriter:
    """Writes a stack page by page; the file appears under its name when the block ends without an error.

    The file is of the flavour of the one it is made ``like`` (ImageJ, OME, plain) and keeps its pixel size, unit and
    axes; it is a BigTIFF where as many pages as that one has would not fit a classic TIFF.
    """

    def __init__(
        self, path: str | os.PathLike[str], like: Described | StackMetadata | None, dtype: npt.DTypeLike
    ) -> None:
        """Prepare to write.

        Args:
            path: the file.
            like: whose pixel size, unit, axes and flavour to keep.
            dtype: of the pixels, float32, uint8 or uint16.

        Raises:
            StackError: if the dtype is another.
        """
        self.path = Path(path)
        self.dtype = np.dtype(dtype)
        if self.dtype.name not in _DTYPES:
            raise StackError(f"{self.path} cannot hold {self.dtype} pixels: write {', '.join(_DTYPES)}")
        if isinstance(like, StackMetadata) or like is None:
            self._kept = like or StackMetadata()
            self._expected = self._kept.pages
        else:
            self._kept, self._expected = like.metadata, like.pages
        self.pages = 0
        self._shape: tuple[int, int] | None = None
        self._tiff: tifffile.TiffWriter | None = None

    def __enter__(self) -> StackWriter:
        self._stack = contextlib.ExitStack()
        self._aside = self._stack.enter_context(atomic_file(self.path))
        self._stack.push(self._finish)
        return self

    def append(self, page: npt.NDArray[Any]) -> None:
        """Write the next slice, [height, width].

        Raises:
            StackError: if it is not of the first one's shape, or the file would outgrow a classic TIFF unannounced.
        """
        if page.ndim != 2 or page.size == 0 or (self._shape is not None and page.shape != self._shape):
            wanted = "height x width" if self._shape is None else f"{self._shape[0]} x {self._shape[1]}"
            raise StackError(f"{self.path} takes slices of {wanted}: one of shape {page.shape} does not belong in it")
        pixels = np.ascontiguousarray(page, dtype=self.dtype)
        if self._tiff is None:
            self._shape = (page.shape[0], page.shape[1])
            self._large = max(self._expected, 1) * pixels.nbytes > CLASSIC_TIFF_BYTES
            self._tiff = tifffile.TiffWriter(self._aside, bigtiff=self._large)
            self._options = self._page_options()
        if not self._large and (self.pages + 1) * pixels.nbytes > CLASSIC_TIFF_BYTES:
            raise StackError(f"{self.path} grows beyond 4 GB, which {self._expected} pages did not announce: split it")
        self._tiff.write(pixels, **self._options)
        self.pages += 1

    def _page_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"photometric": "minisblack", "contiguous": True, "metadata": None}
        if self._kept.resolution is not None:
            options.update(resolution=self._kept.resolution, resolutionunit=self._kept.resolution_unit)
        if self._kept.flavour != "tiff" or self._kept.description is not None:
            # Only a place: what it says depends on the number of pages, which is known at the end.
            options["description"] = " "
        return options

    def _finish(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tiff is not None:
            self._tiff.close()
        if kind is not None:
            return
        if self._shape is None:
            raise StackError(f"{self.path} was given no slices: nothing was written")
        text = describe(self._kept, self.pages, self._shape, self.dtype)
        if text is not None:
            tifffile.tiffcomment(self._aside, text.encode())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
