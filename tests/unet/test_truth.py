from __future__ import annotations

import numpy as np

from unet.scores.truth import UNKNOWN, merges_and_splits, true_segments


def test_merges_and_splits_are_told_from_each_other() -> None:
    labels = np.ones((60, 90), np.uint8)
    labels[:, 30] = labels[:, 60] = 0
    labels[50:, 61:] = 255
    truth = true_segments(labels)
    assert set(np.unique(truth)) == {0, 1, 2, 3, UNKNOWN}
    proposal = labels == 1
    assert merges_and_splits(proposal, truth) == ([], [])
    bridged = proposal.copy()
    bridged[20, 30] = True
    assert merges_and_splits(bridged, truth) == ([1, 2], [])
    cut = proposal.copy()
    cut[30, 61:] = False
    assert merges_and_splits(cut, truth) == ([], [3])
    bridged[30, 61:] = False
    assert merges_and_splits(bridged, truth) == ([1, 2], [3])
    # Less than a tenth of a segment is no part of it.
    chipped = proposal.copy()
    chipped[4, :30] = False
    assert merges_and_splits(chipped, truth) == ([], [])
    assert merges_and_splits(np.zeros_like(proposal), truth) == ([], [])


def test_a_tenth_of_a_segment_and_25_pixels_belong_to_it() -> None:
    truth = np.ones((10, 50), np.int64)
    for pixels, split in ((49, []), (50, [1])):
        proposal = np.ones(truth.shape, bool)
        # One column is membrane, and so many pixels to the left of it are a segment of their own.
        proposal[:, 5] = False
        proposal[: 50 - pixels, 4] = False
        assert merges_and_splits(proposal, truth) == ([], split)
    small = np.ones((10, 10), np.int64)
    for rows, split in ((2, []), (3, [1])):
        proposal = np.ones(small.shape, bool)
        proposal[rows] = False
        assert merges_and_splits(proposal, small) == ([], split)


def test_what_is_no_segment_neither_merges_nor_is_cut() -> None:
    truth = np.zeros((10, 30), np.int64)
    truth[:, :10], truth[:, 20:] = 7, UNKNOWN
    proposal = np.ones(truth.shape, bool)
    assert merges_and_splits(proposal, truth) == ([], [])
