"""Cells in three dimensions: the segments of each slice, linked through the stack where they overlap.

With no least overlap they are the 6-connected components of the volume. Two passes over the slices, of which at most a
few are in memory: the first finds segments and overlaps, the second writes each pixel's cell. What is kept of the whole
volume is a few numbers for each segment.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.errors import ClientError
from unet.files import naming

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from unet.progress import Progress
    from unet.volume import StackMetadata

    # Of a slice: a mask [H, W], True in cells.
    Masks = Callable[[int], npt.NDArray[np.bool_]]
    # `serve.volume.request.Request.progress`.
    ShowsProgress = Callable[..., Progress]

Ints = npt.NDArray[np.int64]

_BLOCK_PX = 2**22
_COLUMNS = (
    *("id", "voxels", "volume_um3", "z0", "y0", "x0", "z1", "y1", "x1"),
    *("centroid_z", "centroid_y", "centroid_x", "centroid_z_nm", "centroid_y_nm", "centroid_x_nm"),
)


@dataclass(frozen=True)
class Cells:
    """Every cell of a volume. Cell ``n`` is the n-th by its first pixel, in the order of slices, rows and columns.

    Attributes:
        numbers: the cell of each segment, int64; 0 where it was too small.
        firsts: the number of segments before each slice, int64 [slices + 1].
        voxels: of each cell, int64 [cells].
        box: int64 [cells, 6]: first slice, row and column, and one past the last of each.
        centroid: float64 [cells, 3]: slice, row and column.
    """

    numbers: Ints
    firsts: Ints
    voxels: Ints
    box: Ints
    centroid: npt.NDArray[np.float64]

    def ids(self, page: int, mask: npt.NDArray[np.bool_]) -> Ints:
        """The cell of each pixel of a slice, 0 in none; ``mask`` is the one that the cells were found in."""
        labels, _ = label(mask)
        own = self.numbers[self.firsts[page] : self.firsts[page + 1]]
        lookup: Ints = np.concatenate([np.zeros(1, np.int64), own])
        return np.asarray(lookup[labels], np.int64)

    def write_table(self, path: Path, pixel_size_nm: Sequence[float | None]) -> None:
        """Write one line for each cell; sizes in nanometres stay empty where the pixel size is not known."""
        size = [math.nan if one is None else one for one in pixel_size_nm]
        volume = self.voxels * math.prod(size) * 1e-9
        metric = self.centroid * size
        with naming(path), path.open("w", newline="", encoding="ascii") as stream:
            writer = csv.writer(stream)
            writer.writerow(_COLUMNS)
            for index in range(len(self.voxels)):
                known = [f"{one:.6g}" if math.isfinite(one) else "" for one in (volume[index], *metric[index])]
                middle = [f"{one:.2f}" for one in self.centroid[index]]
                writer.writerow([index + 1, self.voxels[index], known[0], *self.box[index], *middle, *known[1:]])


def table_of(target: Path) -> Path:
    """The table that lies beside cells in 3-D."""
    return target.with_name(f"{target.name.removesuffix('.zarr').removesuffix('.tif').removesuffix('.ome')}.csv")


def cells_mark(link: float, min_voxels: int) -> str:
    """What the tag of cells in 3-D says beside the rest."""
    return f"; link {link:g}, at least {min_voxels} voxels"


def label(mask: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[Any], int]:
    """Number the 4-connected segments of a mask [H, W] from 1 on, as the scores do; and how many there are."""
    import scipy.ndimage

    labels, count = scipy.ndimage.label(mask)
    return np.asarray(labels), int(count)


def components(pairs: npt.NDArray[np.int64], total: int) -> Ints:
    """Number what pairs join.

    Args:
        pairs: int64 [2, P], each two of the things 0 to ``total`` - 1.
        total: how many things there are.

    Returns:
        int64 [total], the number of the component that each belongs to, from 0 on in the order of their first things.
    """
    import scipy.sparse
    import scipy.sparse.csgraph

    graph = scipy.sparse.coo_array((np.ones(pairs.shape[1], np.int8), (pairs[0], pairs[1])), (total, total))
    _, component = scipy.sparse.csgraph.connected_components(graph, directed=False)
    _, first, inverse = np.unique(component, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(first))[inverse])


def pages_above(metadata: StackMetadata, pages: int) -> list[int | None]:
    """For each slice the one before it in depth, which no time point or channel lies between.

    Raises:
        ClientError: the axes are known, are several, and none is depth.
    """
    axes, lengths = metadata.axes, metadata.lengths
    if len(axes) <= 1 or math.prod(lengths) != pages:
        return [None, *range(pages - 1)]
    if "Z" not in axes:
        raise ClientError(f"cells are linked in depth, and the slices count through {', '.join(axes)}: take labels")
    place = axes.index("Z")
    step = math.prod(lengths[place + 1 :])
    return [page - step if page // step % lengths[place] else None for page in range(pages)]


def find_cells(masks: Masks, above: Sequence[int | None], share: float, least: int, progress: ShowsProgress) -> Cells:
    """Link the segments of all slices.

    Args:
        masks: gives a slice's mask.
        above: of each slice the one that it is linked with, or None.
        share: of what two segments cover together, that both must cover to be one cell; 0 for any pixel.
        least: voxels of a cell; smaller ones are left out.
        progress: shows how far the slices are.
    """
    counts, found, joined = [0], [], [np.empty((2, 0), np.int64)]
    # The slices that later ones are still compared with, and by which of them the last time.
    held: dict[int, npt.NDArray[Any]] = {}
    last = {upper: page for page, upper in enumerate(above) if upper is not None}
    for page in progress(len(above), "slices whose cells were linked", name="cells").over(range(len(above))):
        labels, count = label(masks(page))
        found.append(_measure(page, labels, count))
        upper = above[page]
        if upper is not None:
            sizes = found[upper].voxels, found[page].voxels
            pairs = _overlapping(held[upper], labels, sizes, share)
            joined.append(pairs + np.array([[counts[upper]], [counts[page]]]))
            if last[upper] == page:
                del held[upper]
        if page in last:
            held[page] = labels
        counts.append(counts[-1] + count)
    return _joined(_Segments.of_all(found), np.array(counts), np.concatenate(joined, axis=1), least)


@dataclass(frozen=True)
class _Segments:
    """Of some segments: voxels int64 [N], box int64 [N, 6], and the sums of their places float64 [N, 3]."""

    voxels: Ints
    box: Ints
    sums: npt.NDArray[np.float64]

    @classmethod
    def of_all(cls, parts: Sequence[_Segments]) -> _Segments:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("voxels", "box", "sums")))


def _measure(page: int, labels: npt.NDArray[Any], count: int) -> _Segments:
    import scipy.ndimage

    width = labels.shape[1]
    voxels, rows, columns = (np.zeros(count + 1) for _ in range(3))
    for row0, block in _blocks(labels):
        flat = block.ravel()
        voxels += np.bincount(flat, minlength=count + 1)
        rows += np.bincount(flat, np.repeat(np.arange(row0, row0 + len(block), dtype=float), width), count + 1)
        columns += np.bincount(flat, np.tile(np.arange(width, dtype=float), len(block)), count + 1)
    boxes = [
        (page, rows_.start, columns_.start, page + 1, rows_.stop, columns_.stop)
        for rows_, columns_ in scipy.ndimage.find_objects(labels)
    ]
    sums = np.stack([page * voxels, rows, columns], axis=1)[1:]
    return _Segments(voxels[1:].astype(np.int64), np.array(boxes, np.int64).reshape(-1, 6), sums)


def _overlapping(
    upper: npt.NDArray[Any], lower: npt.NDArray[Any], sizes: tuple[Ints, Ints], share: float
) -> npt.NDArray[np.int64]:
    """The segments of two slices, counted from 0, that have enough pixels in common: [2, pairs]."""
    keys, counts = [], []
    for row0, block in _blocks(lower):
        above = upper[row0 : row0 + len(block)]
        both = (above > 0) & (block > 0)
        key = (above[both].astype(np.int64) - 1) * len(sizes[1]) + block[both] - 1
        # Neighbours along a row mostly agree, and sorting runs of them is quicker than sorting pixels.
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        keys.append(key[starts])
        counts.append(np.diff(starts, append=len(key)))
    pairs, inverse = np.unique(np.concatenate(keys), return_inverse=True)
    common = np.bincount(inverse, np.concatenate(counts), len(pairs))
    first, second = pairs // max(1, len(sizes[1])), pairs % max(1, len(sizes[1]))
    enough = common >= share * (sizes[0][first] + sizes[1][second] - common)
    return np.stack([first[enough], second[enough]])


def _joined(segments: _Segments, firsts: Ints, pairs: npt.NDArray[np.int64], least: int) -> Cells:
    total = int(firsts[-1])
    if not total:
        return Cells(segments.voxels, firsts, segments.voxels, segments.box, segments.sums)
    # Segments rise in the order of their first pixels, so a cell's first segment has its first pixel.
    cell = components(pairs, total)
    count = int(cell.max()) + 1
    voxels, sums = np.zeros(count, np.int64), np.zeros((count, 3))
    box = np.tile(np.array([np.iinfo(np.int64).max] * 3 + [0] * 3), (count, 1))
    np.add.at(voxels, cell, segments.voxels)
    np.add.at(sums, cell, segments.sums)
    np.minimum.at(box[:, :3], cell, segments.box[:, :3])
    np.maximum.at(box[:, 3:], cell, segments.box[:, 3:])
    kept = voxels >= least
    numbers = np.where(kept, np.cumsum(kept), 0)[cell]
    return Cells(numbers, firsts, voxels[kept], box[kept], (sums / voxels[:, np.newaxis])[kept])


def _blocks(plane: npt.NDArray[Any]) -> Iterable[tuple[int, npt.NDArray[Any]]]:
    """A plane by blocks of rows, each with the number of its first."""
    step = max(1, _BLOCK_PX // plane.shape[1])
    return ((row0, plane[row0 : row0 + step]) for row0 in range(0, len(plane), step))
