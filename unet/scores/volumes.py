"""The scores of the CREMI challenge for cells in a volume, from blocks: variation of information and Rand error.

Both come from one table, the voxels that each pair of a true cell and a found segment share. It grows by block, so that
no volume is held in memory: what is held is one block, and the pairs that there are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError
from unet.volume import BLOCK_PX

if TYPE_CHECKING:
    from collections.abc import Iterable

    from unet.volume import Volume

_MOST_PENDING = 2**21
Counted = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class VolumeScores:
    """How well segments are the true cells; 0 is best for each.

    Attributes:
        split: variation of information from cells that were cut apart, H(segments | truth), in bits.
        merge: that from cells that were joined, H(truth | segments), in bits.
        rand_error: adapted Rand error, one minus the F score of the pairs of voxels of one cell.
        voxels: how many were scored.
    """

    split: float
    merge: float
    rand_error: float
    voxels: int

    @property
    def variation(self) -> float:
        """The whole variation of information, in bits."""
        return self.split + self.merge

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "variation": self.variation}

    def __str__(self) -> str:
        return (
            f"variation of information {self.variation:.4f} bits (split {self.split:.4f}, merge {self.merge:.4f}), "
            f"adapted Rand error {self.rand_error:.4f}"
        )


class Overlaps:
    """The voxels that each pair of a true cell and a segment share.

    Args:
        ignored: the id in the truth whose voxels are left out of all counts; None counts all.
    """

    def __init__(self, ignored: int | None = 0) -> None:
        self._ignored = ignored
        self._pending: list[Counted] = []

    def add(self, truth: npt.NDArray[np.integer[Any]], segments: npt.NDArray[np.integer[Any]]) -> None:
        """Count a block: ids of the same shape."""
        a, b = truth.ravel(), segments.ravel()
        if self._ignored is not None:
            kept = a != self._ignored
            a, b = a[kept], b[kept]
        if not a.size:
            return
        # Neighbours along a row are mostly of one pair: their runs are far fewer than the voxels.
        starts = np.concatenate([[0], np.flatnonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1])) + 1])
        lengths = np.diff(starts, append=a.size).astype(np.int64)
        self._pending.append(_summed([(a[starts], b[starts], lengths)]))
        if sum(len(counts) for _, _, counts in self._pending) > _MOST_PENDING:
            self._pending = [_summed(self._pending)]

    def scores(self) -> VolumeScores:
        """The scores of all blocks together.

        Raises:
            UnetError: if no voxel was counted.
        """
        if not self._pending:
            raise UnetError("the truth has no cell in what is scored: name the id that is no cell with --ignore_label")
        self._pending = [_summed(self._pending)]
        a, b, counts = self._pending[0]
        shared = counts.astype(np.float64)
        voxels = shared.sum()
        of_truth, of_segments = _sums_by(a, shared), _sums_by(b, shared)
        # Pairs of voxels that are together, in both, in the truth, and in the segments; each pair twice.
        both, true, found = (float(sizes @ sizes - voxels) for sizes in (shared, of_truth.sums, of_segments.sums))
        return VolumeScores(
            split=_conditional_entropy(shared, of_truth.of_each),
            merge=_conditional_entropy(shared, of_segments.of_each),
            # Without any pair nothing can be told apart wrongly.
            rand_error=1 - 2 * both / (true + found) if true + found > 0 else 0.0,
            voxels=int(voxels),
        )


@dataclass(frozen=True)
class _Sums:
    sums: npt.NDArray[np.float64]
    of_each: npt.NDArray[np.float64]


def _sums_by(ids: npt.NDArray[Any], values: npt.NDArray[np.float64]) -> _Sums:
    """The sum of the values of each id, and for each value the sum of its id."""
    _, index = np.unique(ids, return_inverse=True)
    sums = np.asarray(np.bincount(index, values), np.float64)
    return _Sums(sums, sums[index])


def _conditional_entropy(shared: npt.NDArray[np.float64], given: npt.NDArray[np.float64]) -> float:
    return max(0.0, float(-np.sum(shared * np.log2(shared / given)) / shared.sum()))


def _summed(parts: Iterable[Counted]) -> Counted:
    """One line for each pair."""
    a, b, counts = (np.concatenate(arrays) for arrays in zip(*parts))
    order = np.lexsort((b, a))
    a, b, counts = a[order], b[order], counts[order]
    starts = np.concatenate([[0], np.flatnonzero((a[1:] != a[:-1]) | (b[1:] != b[:-1])) + 1])
    return a[starts], b[starts], np.add.reduceat(counts, starts)


def score_volumes(truth: Volume, segments: Volume, pages: range | None = None, ignored: int | None = 0) -> VolumeScores:
    """Score a volume of segments against one of true cells, by blocks of rows.

    Args:
        truth: ids of the cells.
        segments: ids of the segments, of the same size.
        pages: the slices to score; all by default.
        ignored: the id in the truth that is no cell; None counts all.

    Raises:
        UnetError: if the sizes differ, or there is no cell.
    """
    shapes = [(volume.pages, volume.height, volume.width) for volume in (segments, truth)]
    if shapes[0] != shapes[1]:
        raise UnetError(f"{segments.path} is {shapes[0]} but {truth.path} is {shapes[1]}")
    overlaps = Overlaps(ignored)
    step = max(1, BLOCK_PX // truth.width)
    for page in pages if pages is not None else range(truth.pages):
        for row0 in range(0, truth.height, step):
            row1 = min(truth.height, row0 + step)
            overlaps.add(truth.rows(page, row0, row1), segments.rows(page, row0, row1))
    return overlaps.scores()
