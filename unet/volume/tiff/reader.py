"""Image stacks in and out: TIFF, BigTIFF, ImageJ and OME-TIFF, page by page.

What a file declares (size, number of pages, bit depth, where its pixels lie) is checked before any of it is decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.volume.limits import IMAGE_LIMITS, Limits, StackError
from unet.volume.metadata import read_metadata
from unet.volume.tiff.checks import DAMAGE, check_page, damaged, open_tiff, unreadable_compression
from unet.volume.tiff.layout import layout_of
from unet.volume.tiff.segments import Segments
from unet.volume.volume import Volume

AnyArray = npt.NDArray[Any]
# Larger pages are decoded by their strips or tiles.
_WHOLE_PX = 2**24

# Its warnings about damaged files say in several lines what the checks here say in one sentence.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class StackReader(Volume):
    """An open stack of equal grey slices; a context manager and a sequence of arrays [height, width].

    All pixels come through the one descriptor that was opened first, so that a file that replaces this one under the
    same name never gives some of them. ``changed`` tells whether that, or a change in place, has happened.

    Attributes:
        path: the file.
        pages: number of slices.
        height: rows of each.
        width: columns of each.
        dtype: of the pixels, in the machine's own byte order.
        metadata: what a file written beside this one keeps.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits = IMAGE_LIMITS) -> None:
        """Open and check a stack.

        Raises:
            StackError: if the file is missing, is no TIFF, is truncated, or declares something unfit.
        """
        self.path, self._limits = Path(path), limits
        self._file = open_tiff(self.path)
        self._opened = os.fstat(self._file.filehandle.fileno())
        self._fingerprint: dict[str, Any] = {}
        self._decoded: tuple[int, AnyArray] | None = None
        self._segments: tuple[int, Segments] | None = None
        try:
            self._check(limits)
        except StackError:
            self.close()
            raise
        except DAMAGE as error:
            self.close()
            raise damaged(self.path) from error

    def _check(self, limits: Limits) -> None:
        first = self._file.pages.first
        check_page(self.path, 0, first, limits)
        self.height, self.width = int(first.imagelength), int(first.imagewidth)
        self.dtype: np.dtype[Any] = np.dtype(first.dtype).newbyteorder("=")
        layout = layout_of(self._file, self.path, limits)
        self.pages, self._directories = layout.pages, layout.directories
        self._offset: int | None = int(first.dataoffsets[0]) if layout.together else None
        self._inverted = tuple(
            self._check_against_first(directory, limits, self._opened.st_size) for directory in self._directories
        )
        if self._offset is not None:
            if first.compression != 1 or self._offset + self.pages * self._page_bytes > self._opened.st_size:
                raise damaged(self.path)
            self._inverted *= self.pages
        # Of other pixels each slice is looked at whole.
        self._as_stored = self.dtype.kind in "ui" or (self.dtype.kind == "f" and not limits.finite)
        self.metadata = read_metadata(self._file, self.path, layout.axes, layout.lengths)

    def _check_against_first(self, index: int, limits: Limits, size: int) -> bool:
        """Check a directory; whether white is zero in it."""
        first, page = self._file.pages.first, self._file.pages[index]
        check_page(self.path, index, page, limits)
        if (page.imagelength, page.imagewidth, page.dtype) != (first.imagelength, first.imagewidth, first.dtype):
            raise StackError(
                f"{self.path} is not a stack of equal slices: page 0 is {self.height} x {self.width} {self.dtype}, "
                f"page {index} is {page.imagelength} x {page.imagewidth} {page.dtype}: save slices of one size together"
            )
        ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts)]
        least = self._page_bytes if page.compression == 1 else 1
        if not ends or max(ends) > size or sum(page.databytecounts) < least:
            raise damaged(self.path)
        # Brightness grows with the value except in this format, where ImageJ's "inverting LUT" is the usual source.
        return getattr(page.photometric, "name", "") == "MINISWHITE"

    @property
    def _page_bytes(self) -> int:
        return self.height * (-(-self.width // 8) if self.dtype.kind == "b" else self.width * self.dtype.itemsize)

    def __getitem__(self, index: int) -> AnyArray:
        """Slice ``index``, [height, width], counted from 0.

        Raises:
            IndexError: if there is no such slice.
            StackError: if its pixels cannot be decoded, or hold a value that is not a finite number.
        """
        self.check_page(index)
        self.check_whole(self._limits)
        with self._decoding(index):
            page = self._checked(index, self._decode(index))
        if page.shape != (self.height, self.width):
            raise damaged(self.path)
        return self._bright(index, page)

    @contextlib.contextmanager
    def _decoding(self, index: int) -> Iterator[None]:
        """Name the page whose pixels a codec cannot decode."""
        try:
            yield
        except StackError:
            raise
        except ImportError as error:
            where = f"page {index} of {self.path}"
            raise unreadable_compression(where, self._file.pages[self._directories[index]]) from error
        except Exception as error:  # each codec fails in its own way
            raise StackError(f"page {index} of {self.path} is damaged ({error}): copy or download it again") from error

    def _checked(self, index: int, decoded: AnyArray) -> AnyArray:
        pixels = np.ascontiguousarray(decoded, dtype=self.dtype)
        if self._limits.finite and pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise StackError(f"page {index} of {self.path} has values that are no finite numbers: write it again")
        return pixels

    def _segments_of(self, index: int) -> Segments:
        if self._segments is None or self._segments[0] != index:
            self._segments = index, Segments(self._file.pages[self._directories[index]])
        return self._segments[1]

    def rows(self, index: int, row0: int, row1: int) -> AnyArray:
        """Rows ``row0`` to ``row1`` of slice ``index``.

        Of a page whose pixels lie uncompressed in one piece only these are read. Of another one that is large, only the
        strips or tiles that hold them are decoded; a small one is decoded whole, which is quicker, and kept until the
        next one is asked for.

        Raises:
            IndexError: if there is no such slice.
            StackError: if its pixels cannot be decoded.
        """
        self.check_page(index)
        offset = self._plain_offset(index)
        if offset is None and self.height * self.width > _WHOLE_PX:
            with self._decoding(index):
                return self._bright(index, self._checked(index, self._segments_of(index).rows(row0, row1)))
        if offset is None:
            if self._decoded is None or self._decoded[0] != index:
                self._decoded = None  # before the next one takes its memory
                self._decoded = index, self[index]
            return self._decoded[1][row0:row1]
        offset += row0 * self.width * self.dtype.itemsize
        rows = self._read(offset, row1 - row0).astype(self.dtype, copy=False)
        return self._bright(index, rows)

    def _bright(self, index: int, pixels: AnyArray) -> AnyArray:
        """Pixels whose values grow with the brightness."""
        if not self._inverted[index]:
            return pixels
        if self.dtype.kind == "b":
            return ~pixels
        return np.iinfo(self.dtype).max - pixels if self.dtype.kind == "u" else pixels

    def _plain_offset(self, index: int) -> int | None:
        """Where the pixels of a page begin that are uncompressed and in one piece; None of another."""
        if self._offset is not None:
            return self._offset + index * self._page_bytes
        page = self._file.pages[self._directories[index]]
        return int(page.dataoffsets[0]) if page.is_memmappable and self._as_stored else None

    def _decode(self, index: int) -> AnyArray:
        if self._offset is None:
            decoded: AnyArray = self._file.pages[self._directories[index]].asarray()
            return decoded
        return self._read(self._offset + index * self._page_bytes, self.height)

    def _read(self, offset: int, rows: int) -> AnyArray:
        """Whole rows as they are stored, from a place in the file on."""
        found = np.empty((rows, self.width), self.dtype.newbyteorder(self._file.byteorder))
        into = found.reshape(-1).view(np.uint8).data
        done = 0
        while done < into.nbytes:
            try:
                count = os.preadv(self._file.filehandle.fileno(), [into[done:]], offset + done)
            except (OSError, OverflowError) as error:  # a place that no file has, or a disk that fails
                raise damaged(self.path) from error
            if count == 0:
                raise damaged(self.path)
            done += count
        return found

    def fingerprint(self) -> dict[str, Any]:
        """The size in bytes, and the SHA-256 in hexadecimal, of the file that was opened; found once."""
        if self._fingerprint:
            return self._fingerprint
        digest, size, descriptor = hashlib.sha256(), 0, self._file.filehandle.fileno()
        while block := os.pread(descriptor, 2**20, size):
            digest.update(block)
            size += len(block)
        self._fingerprint = {"bytes": size, "sha256": digest.hexdigest()}
        return self._fingerprint

    def changed(self) -> bool:
        """Whether the file was written to since it was opened, or another one has its name now.

        One that was moved away is still the one that was opened.
        """
        now = os.fstat(self._file.filehandle.fileno())
        if (now.st_size, now.st_mtime_ns) != (self._opened.st_size, self._opened.st_mtime_ns):
            return True
        try:
            named = self.path.stat()
        except FileNotFoundError:
            return False
        return (named.st_dev, named.st_ino) != (self._opened.st_dev, self._opened.st_ino)

    def close(self) -> None:
        """Close the file, and let go of what was decoded of it."""
        self._decoded = self._segments = None
        self._file.close()
