"""Cells of a slice as pieces that were put together again: what touches at a narrow place only is told apart.

The segments of a mask are cut at their narrow places by a watershed of the distance to the membrane. Then the two
pieces whose common border is least like membrane become one, again and again, as long as the mean probability of
membrane along a border is below a limit. This is mean affinity agglomeration (Lee et al. 2017, "Superhuman accuracy on
the SNEMI3D connectomics challenge", arXiv:1706.00120), with a probability of membrane in the place of affinities.
"""

from __future__ import annotations

import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError

# Of the windows in which a piece's middle is the farthest from the membrane, in pixels.
_RADIUS_PX = 5
_SMOOTHING_PX = 1.0


def agglomerate(
    probability: npt.NDArray[Any], threshold: float, merge_below: float
) -> tuple[npt.NDArray[np.int64], int]:
    """Number the cells of a slice.

    Args:
        probability: of "not membrane", [H, W] in [0, 1].
        threshold: membrane is where it is not above this.
        merge_below: pieces become one where the mean probability of membrane along their border is below this. Above
            1 it gives the 4-connected segments of the mask; 0 leaves all pieces apart.

    Returns:
        The cells, int64 [H, W], from 1 on in the order of their first pixels, 0 for membrane; and how many there are.
    """
    pieces = _pieces(probability > threshold)
    cell = _merged(*_borders(pieces, 1 - np.asarray(probability, np.float64)), int(pieces.max()) + 1, merge_below)
    # The background is 0 and stays apart; cells are numbered anew by their first pixels.
    found = cell[pieces]
    names, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    inside = names > 0
    number = np.zeros(len(names), np.int64)
    number[np.flatnonzero(inside)[np.argsort(first[inside])]] = np.arange(1, inside.sum() + 1)
    return number[inverse].reshape(found.shape), int(inside.sum())


def check_limit(threshold: float, merge_below: float) -> None:
    """Refuse a limit that is no probability, or that all borders above the threshold are below, so that none can hold.

    Raises:
        UnetError: saying so.
    """
    if not 0 <= merge_below <= 1:
        raise UnetError(f"--agglomerate is {merge_below:g}; it must be from 0 to 1, and 0.2 suits")
    if merge_below >= 1 - threshold:
        raise UnetError(
            f"--agglomerate {merge_below:g} changes nothing at the threshold {threshold:g}: give a --threshold below "
            f"{1 - merge_below:g}, such as 0.5"
        )


def _pieces(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """The segments of a mask, cut at their narrow places: int64 [H, W]."""
    import scipy.ndimage
    from skimage.segmentation import watershed

    distance = scipy.ndimage.distance_transform_edt(mask)
    smooth = scipy.ndimage.gaussian_filter(distance, _SMOOTHING_PX)
    middles = (smooth == scipy.ndimage.maximum_filter(smooth, 2 * _RADIUS_PX + 1)) & mask
    seeds, count = scipy.ndimage.label(middles)
    # A small segment beside a wide one may have no middle of its own.
    segments, last = scipy.ndimage.label(mask)
    has_seed = np.zeros(last + 1, bool)
    has_seed[segments[middles]] = True
    alone = mask & ~has_seed[segments]
    seeds = np.where(alone, segments + count, seeds)
    return np.asarray(watershed(-distance, seeds, mask=mask), np.int64)


def _borders(
    pieces: npt.NDArray[np.int64], membrane: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Which pieces touch, int64 [B, 2], the sum of membrane along each border, and its length in pairs of pixels.

    A pair of pixels counts by the one that is more like membrane.
    """
    sides, values = [], []
    for axis in (0, 1):
        ahead, behind = np.delete(pieces, 0, axis), np.delete(pieces, -1, axis)
        touching = (ahead != behind) & (ahead > 0) & (behind > 0)
        sides.append(np.sort(np.stack([ahead[touching], behind[touching]], axis=1), axis=1))
        values.append(np.maximum(np.delete(membrane, 0, axis)[touching], np.delete(membrane, -1, axis)[touching]))
    both, inverse = np.unique(np.concatenate(sides), axis=0, return_inverse=True)
    inverse = np.asarray(inverse).reshape(-1)
    sums, lengths = np.bincount(inverse, np.concatenate(values), len(both)), np.bincount(inverse, minlength=len(both))
    return both, np.asarray(sums, np.float64), np.asarray(lengths, np.int64)


def _merged(
    both: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
    lengths: npt.NDArray[np.int64],
    count: int,
    merge_below: float,
) -> npt.NDArray[np.int64]:
    """The piece that each of ``count`` pieces, 0 the background, has become part of: int64 [count]."""
    borders: list[dict[int, tuple[float, int]]] = [{} for _ in range(count)]
    waiting = []
    for (one, other), total, length in zip(both.tolist(), sums.tolist(), lengths.tolist()):
        borders[one][other] = borders[other][one] = (total, length)
        waiting.append((total / length, one, other, length))
    heapq.heapify(waiting)
    part_of = np.arange(count)
    while waiting and waiting[0][0] < merge_below:
        _, kept, gone, length = heapq.heappop(waiting)
        # What has merged meanwhile has another border.
        if borders[kept].get(gone, (0.0, 0))[1] != length:
            continue
        part_of[gone] = kept
        del borders[kept][gone], borders[gone][kept]
        for neighbour, (total, length) in borders[gone].items():
            before = borders[kept].get(neighbour, (0.0, 0))
            joined = (total + before[0], length + before[1])
            borders[kept][neighbour] = borders[neighbour][kept] = joined
            del borders[neighbour][gone]
            heapq.heappush(waiting, (joined[0] / joined[1], *sorted((kept, neighbour)), joined[1]))
        borders[gone] = {}
    while (part_of != part_of[part_of]).any():
        part_of = part_of[part_of]
    return part_of
