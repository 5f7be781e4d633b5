"""True segments beside the proposed ones: which of them a proposal merges, and which it splits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from unet.volume.labels import NOT_ANNOTATED, NOT_MEMBRANE

# A true and a proposed segment belong together where they share a tenth of the true one, and so many pixels.
LEAST_SHARE, LEAST_PX = 0.1, 25
MERGE_AND_SPLIT_RULE = (
    f"A true segment counts as split where two proposed ones each hold {LEAST_SHARE:.0%} of it, and as merged "
    f"where one proposed segment holds as much of it and of another; {LEAST_PX} pixels at least."
)
# The number that stands for "nobody annotated this" in the picture of the true segments.
UNKNOWN = 0xFFFFFF


def true_segments(labels: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """The 4-connected true segments of a slice, numbered from 1 on, [H, W]; 0 is membrane, `UNKNOWN` not annotated.

    Args:
        labels: uint8 [H, W] as `read_labels` gives them.
    """
    import scipy.ndimage

    segments = np.asarray(scipy.ndimage.label(labels == NOT_MEMBRANE)[0], np.int64)
    segments[labels == NOT_ANNOTATED] = UNKNOWN
    return segments


def merges_and_splits(
    proposal: npt.NDArray[np.bool_], truth: npt.NDArray[np.integer[Any]]
) -> tuple[list[int], list[int]]:
    """The true segments that a proposal joins with others, and those that it cuts.

    Args:
        proposal: [H, W], True where not membrane; its 4-connected segments count, as they are.
        truth: numbers of true segments, [H, W], as `true_segments` gives them.

    Returns:
        The numbers of the merged and of the split ones, rising; one can be both.
    """
    import scipy.ndimage

    proposed = np.asarray(scipy.ndimage.label(proposal)[0], np.int64)
    inside = (truth > 0) & (truth != UNKNOWN)
    sizes = np.bincount(truth[inside])
    both = inside & (proposed > 0)
    pairs, counts = np.unique(truth[both] * (int(proposed.max()) + 1) + proposed[both], return_counts=True)
    true, ours = np.divmod(pairs, int(proposed.max()) + 1)
    together = counts >= np.maximum(LEAST_PX, LEAST_SHARE * sizes[true])
    true, ours = true[together], ours[together]
    split = np.flatnonzero(np.bincount(true) > 1)
    merging = np.flatnonzero(np.bincount(ours) > 1)
    merged = np.unique(true[np.isin(ours, merging)])
    return [int(one) for one in merged], [int(one) for one in split]
