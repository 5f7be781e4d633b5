"""A compressed or tiled page read by rows: only the strips or tiles that hold them are decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Compressions whose tables stand once in the page: JPEG in its several numbers.
_JPEG = (6, 7, 34892, 33007)


class Segments:
    """The strips or tiles of one page. Those that were decoded last are kept: rows are asked for in their order.

    Args:
        page: of an open file; of one plane and one sample a pixel.

    Attributes:
        height: rows of each.
    """

    def __init__(self, page: Any) -> None:
        self._page, self._frame = page, page.keyframe
        self._shape = int(page.imagelength), int(page.imagewidth)
        self.height = segment_height(page)
        self._across = -(-self._shape[1] // int(page.tilewidth)) if page.is_tiled else 1
        self._kept: tuple[int, npt.NDArray[Any]] | None = None

    def rows(self, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1``, [R, width], as the page's own reading gives them.

        Raises:
            Exception: what the codec raises of damaged pixels; ImportError where it is not installed.
        """
        first, last = row0 // self.height, (row1 - 1) // self.height
        parts = []
        for band in range(first, last + 1):
            top = band * self.height
            parts.append(self._band(band)[max(row0, top) - top : row1 - top])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _band(self, band: int) -> npt.NDArray[Any]:
        """All strips or tiles of the same rows."""
        if self._kept is not None and self._kept[0] == band:
            return self._kept[1]
        self._kept = None  # before the next one takes its memory
        height, width = self._shape
        found = np.full((min(self.height, height - band * self.height), width), self._frame.nodata, self._frame.dtype)
        for number in range(band * self._across, (band + 1) * self._across):
            decoded, (_, _, _, col, _), _ = self._decode(number)
            if decoded is not None:  # an empty one has no bytes
                inner = decoded[0, : len(found), : width - col, 0]
                found[: inner.shape[0], col : col + inner.shape[1]] = inner
        self._kept = band, found
        return found

    def _decode(self, number: int) -> Any:
        tables = {"jpegtables": self._page.jpegtables} if self._frame.compression in _JPEG else {}
        handle = self._page.parent.filehandle
        handle.seek(self._page.dataoffsets[number])
        content = handle.read(self._page.databytecounts[number])
        return self._frame.decode(content or None, number, **tables)


def segment_height(page: Any) -> int:
    """Rows of a page's tiles, which may reach beyond it, or of its strips, which do not."""
    if page.is_tiled:
        return int(page.tilelength)
    return min(int(page.rowsperstrip), int(page.imagelength)) or int(page.imagelength)
