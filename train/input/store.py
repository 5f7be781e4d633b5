"""Labelled stacks, decoded once: in memory while they are small, else in a file that only this process sees."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from train.model.border import border_weights
from train.run.progress import progress, watched
from unet.errors import warn
from unet.geometry import HALO
from unet.intensity import WindowChoice, find_windows
from unet.volume import BLOCK_PX, NOT_ANNOTATED, LabelOptions, check_pair, label_blocks, open_volume

# Planes of more bytes than this go to a file. The system keeps of it what memory is free.
IN_MEMORY_BYTES = 2**28
_BORDER_BLOCK_PX, _BORDER_MARGIN_PX = 2048, 256


@dataclass(frozen=True)
class Slice:
    """One labelled slice.

    Attributes:
        name: the stack's file and the page.
        image: uint8 [H, W].
        label: uint8 [H, W]: 0 membrane, 1 not, 255 where it counts nowhere.
        border: float16 [H, W], the extra cost of membrane between two close cells; None for none anywhere.
    """

    name: str
    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    border: npt.NDArray[np.float16] | None = None

    @property
    def annotated(self) -> bool:
        """Whether any pixel counts."""
        return any((rows != NOT_ANNOTATED).any() for rows in _row_blocks(self.label))

    def part(self, rows: range, cols: range) -> Slice:
        """A rectangle of it, with what the network sees around that; the label counts in the rectangle alone."""
        height, width = self.label.shape
        top, bottom = max(0, rows.start - HALO), min(height, rows.stop + HALO)
        left, right = max(0, cols.start - HALO), min(width, cols.stop + HALO)
        label = np.full((bottom - top, right - left), NOT_ANNOTATED, np.uint8)
        inner = self.label[rows.start : rows.stop, cols.start : cols.stop]
        label[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left] = inner
        return Slice(self.name, self.image[top:bottom, left:right], label)

    def release(self) -> None:
        """Let the system take back the memory of what was read from files; it is read again when it is needed."""
        for plane in (self.image, self.label, self.border):
            _release(plane)


def _release(plane: npt.NDArray[Any] | None) -> None:
    base: Any = plane
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, mmap.mmap):
        base.madvise(mmap.MADV_DONTNEED)


def planes(shape: tuple[int, ...], dtype: npt.DTypeLike, *, in_memory: bool) -> npt.NDArray[Any]:
    """An empty array, in memory or in a file that is gone when the process ends, however it ends.

    The file is in TMPDIR, or else in /var/tmp, which is on a disk where /tmp may be in memory.

    Raises:
        OSError: if there is no room for the file.
    """
    if in_memory:
        return np.empty(shape, dtype)
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    folder = os.environ.get("TMPDIR") or ("/var/tmp" if Path("/var/tmp").is_dir() else tempfile.gettempdir())
    with tempfile.TemporaryFile(dir=folder) as stream:
        try:
            # All of it now: a disk that fills under a mapped file kills the process.
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"the decoded slices in {folder}") from error
        return np.memmap(stream, dtype, "r+", shape=shape)


def load_stack(
    pair: tuple[Path, Path],
    options: LabelOptions,
    border_weight: float,
    window: WindowChoice = None,
    *,
    in_memory: bool = True,
) -> list[Slice]:
    """The slices of a stack and its labels.

    Args:
        pair: files of the images and of the labels.
        options: how the labels' values are understood.
        border_weight: the largest extra cost of membrane between two cells, 0 for none.
        window: how the intensities become 8 bits.
        in_memory: whether the planes are kept in memory.

    Raises:
        StackError: if a file cannot be read, the two do not fit, or the labels are implausible.
    """
    check_pair(*pair)
    with open_volume(pair[0]) as reader:
        shape = (len(reader), reader.height, reader.width)
        images = planes(shape, np.uint8, in_memory=in_memory)
        with progress(None, f"looking through {pair[0].name}", passing=True) as shown:
            windows = find_windows(reader, window, shown.advance)
        step = max(1, BLOCK_PX // reader.width)
        for page in watched(range(len(reader)), f"slices of {pair[0].name} decoded", passing=True):
            for row0 in range(0, reader.height, step):
                row1 = min(reader.height, row0 + step)
                images[page, row0:row1] = windows.apply(page, reader.rows(page, row0, row1))
                _release(images)
    for note in windows.notes:
        warn(note)
    labels = planes(shape, np.uint8, in_memory=in_memory)
    shown = progress(None, f"looking through {pair[1].name}", unit="block", passing=True)
    for page, row0, rows in shown.over(label_blocks(pair[1], options)):
        labels[page, row0 : row0 + len(rows)] = rows
        _release(labels)
    borders = planes(shape, np.float16, in_memory=in_memory) if border_weight > 0 else None
    if borders is not None:
        for page in watched(range(len(labels)), "slices weighted by their cells' borders", passing=True):
            _draw_border(labels[page], borders[page], border_weight)
            _release(borders)
            _release(labels)
    return [
        Slice(f"{pair[0].name}[{page}]", images[page], labels[page], None if borders is None else borders[page])
        for page in range(len(images))
    ]


def _row_blocks(plane: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    step = max(1, BLOCK_PX // plane.shape[1])
    return [plane[row0 : row0 + step] for row0 in range(0, len(plane), step)]


def _draw_border(label: npt.NDArray[np.uint8], into: npt.NDArray[np.float16], weight: float) -> None:
    """The border weights of a slice, block by block: a cell that only meets itself far outside counts as two."""
    height, width = label.shape
    block, margin = _BORDER_BLOCK_PX, _BORDER_MARGIN_PX
    for row in range(0, height, block):
        for col in range(0, width, block):
            top, left = max(0, row - margin), max(0, col - margin)
            around = np.asarray(label[top : row + block + margin, left : col + block + margin])
            found = border_weights(around, weight)
            inner = into[row : row + block, col : col + block]
            inner[:] = found[row - top :, col - left :][: inner.shape[0], : inner.shape[1]]


def bytes_of(pair: tuple[Path, Path], border_weight: float) -> int:
    """Bytes that `load_stack` keeps of a stack.

    Raises:
        StackError: if the images cannot be read.
    """
    with open_volume(pair[0]) as reader:
        return len(reader) * reader.height * reader.width * (2 + 2 * (border_weight > 0))
