from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unet.errors import UnetError
from unet.scores import agglomerate, check_limit, score_agglomerated, score_stack
from unet.scores.__main__ import main


def two_cells(gap: float, width: int = 3) -> np.ndarray:  # type: ignore[type-arg]
    """Two cells of 20 x 20 with membrane between, which has a gap of this probability."""
    found = np.full((20, 41), 0.99, np.float32)
    found[:, 20] = 0.01
    found[10 : 10 + width, 20] = gap
    return found


@pytest.mark.parametrize(("gap", "cells"), [(0.4, 2), (0.6, 2), (0.75, 2), (0.85, 1), (0.99, 1)])
def test_a_gap_joins_cells_only_where_it_does_not_look_like_membrane(gap: float, cells: int) -> None:
    labels, count = agglomerate(two_cells(gap), 0.5, 0.2)
    assert count == cells
    assert (labels[0, 0], labels[0, 40]) == (1, cells)
    # The mask alone joins them from 0.5 on.
    assert scipy.ndimage.label(two_cells(gap) > 0.5)[1] == (2 if gap < 0.5 else 1)


@pytest.mark.parametrize(("threshold", "limit"), [(0.8, 0.2), (0.5, 0.5), (0.9, 0.3)])
def test_a_limit_that_every_border_is_below_tells_nothing_apart(threshold: float, limit: float) -> None:
    with pytest.raises(UnetError, match=f"--agglomerate {limit:g} changes nothing at the threshold {threshold:g}"):
        check_limit(threshold, limit)
    assert agglomerate(two_cells(0.99), threshold, limit + 1e-9)[1] == 1
    check_limit(0.95 - limit, limit)


def test_the_command_scores_them_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "p.tif", two_cells(0.6)[np.newaxis], photometric="minisblack")
    tifffile.imwrite(tmp_path / "l.tif", (two_cells(0.01) > 0.5)[np.newaxis] * np.uint8(255), photometric="minisblack")
    line = [str(tmp_path / "p.tif"), str(tmp_path / "l.tif"), "--agglomerate", "0.2"]
    assert main([*line, "--threshold", "0.5"]) == 0
    plain, cells = capsys.readouterr().out.splitlines()
    assert "at the threshold 0.5: V_rand thin 0.6" in plain
    assert cells == "cells agglomerated below 0.2, at that threshold: V_rand thin 1.0000, V_info thin 1.0000"
    assert main([*line, "--threshold", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agglomerated_v_rand"] == pytest.approx(1)
    for flags, said in (
        (["--threshold", "0.8"], "--agglomerate 0.2 changes nothing at the threshold 0.8"),
        (["--agglomerate", "2"], "--agglomerate is 2; it must be from 0 to 1"),
        (["--volume"], "--agglomerate makes cells of probabilities in slices"),
    ):
        assert main([*line, *flags]) == 2
        assert said in capsys.readouterr().err


def test_the_least_likely_membrane_goes_first_and_borders_add_up() -> None:
    """Three rooms in a row: the mean of a joint border decides, not the weakest place of it."""
    found = np.full((20, 62), 0.99, np.float32)
    found[:, (20, 41)] = 0.01
    found[8:12, 20], found[8:12, 41] = 0.9, 0.7
    assert agglomerate(found, 0.5, 0.05)[1] == 3
    labels, count = agglomerate(found, 0.5, 0.2)
    assert count == 2
    assert labels[0, 0] == labels[0, 30] != labels[0, 61]
    assert agglomerate(found, 0.5, 0.4)[1] == 1


def test_a_border_of_two_pieces_with_a_third_is_all_of_it_once_they_are_one() -> None:
    """Below two rooms lies a wide one, with a doubtful gap to each. What joins first decides on both gaps together."""
    found = np.full((41, 41), 0.99, np.float32)
    found[:20, 20] = found[20] = 0.01
    found[8:12, 20], found[20, 8:12], found[20, 29:33] = 0.99, 0.55, 0.85
    labels, count = agglomerate(found, 0.5, 0.2)
    assert count == 2
    assert labels[0, 0] == labels[0, 40] != labels[40, 0]
    # The second gap alone, without the first room, is no border.
    assert agglomerate(np.where(np.arange(41) < 21, 0.01, found), 0.5, 0.2)[1] == 1


def two_discs(apart: int) -> np.ndarray:  # type: ignore[type-arg]
    """A disc of radius 4.2 and one of 3.7 that it touches, their centres so many pixels apart."""
    rows, columns = np.mgrid[:20, :40]
    large = (rows - 10) ** 2 + (columns - 14) ** 2 <= 4.2**2
    small = (rows - 10) ** 2 + (columns - 14 - apart) ** 2 <= 3.7**2
    return np.where(large | small, 0.99, 0.01)


@pytest.mark.parametrize(("apart", "pieces"), [(6, 1), (7, 2), (8, 2)])
def test_middles_are_farther_apart_than_six_pixels(apart: int, pieces: int) -> None:
    for found in (two_discs(apart), two_discs(apart)[:, ::-1]):
        assert scipy.ndimage.label(found > 0.5)[1] == 1
        assert agglomerate(found, 0.5, 0)[1] == pieces


def test_what_is_at_the_threshold_is_membrane_and_what_is_at_the_limit_stays_apart() -> None:
    assert agglomerate(np.full((3, 3), 0.5), 0.5, 0.2)[1] == 0
    assert agglomerate(two_cells(0.75), 0.5, 0.25)[1] == 2
    assert agglomerate(two_cells(0.75), 0.5, 0.26)[1] == 1


def test_the_first_cell_may_lie_to_the_right_of_its_neighbour() -> None:
    found = np.full((30, 41), 0.01)
    found[10:, :20] = found[:20, 21:] = found[13:17, 20] = 0.99
    assert agglomerate(found, 0.5, 0)[1] == 2
    assert agglomerate(found, 0.5, 0.2)[1] == 1


def test_the_mean_of_a_joint_border_counts_its_pixels() -> None:
    """The upper rooms join first; then neither gap to the lower room is below the limit alone, but their mean is."""
    found = np.full((41, 41), 0.99, np.float32)
    found[:20, 20] = found[20] = 0.01
    found[8:12, 20], found[20, 8:12], found[20, 29:33] = 0.99, 0.6, 0.85
    # 0.4 and 0.15 of membrane, 0.275 together.
    assert agglomerate(found, 0.5, 0.28)[1] == 1


def test_limits_at_their_ends() -> None:
    check_limit(0.5, 0)
    with pytest.raises(UnetError, match=r"give a --threshold below 0\.8, such as 0\.5"):
        check_limit(0.9, 0.2)


LEVELS = st.sampled_from([0.0, 0.3, 0.55, 0.7, 0.9, 1.0])
maps = arrays(np.float64, st.tuples(st.integers(1, 24), st.integers(1, 24)), elements=LEVELS)


@settings(max_examples=150, deadline=None)
@given(found=maps)
def test_above_one_it_is_the_segments_of_the_mask_in_their_order(found: np.ndarray) -> None:  # type: ignore[type-arg]
    labels, count = agglomerate(found, 0.5, 1.1)
    expected, due = scipy.ndimage.label(found > 0.5)
    assert count == due
    np.testing.assert_array_equal(labels, expected)


@settings(max_examples=100, deadline=None)
@given(found=maps, limits=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted))
def test_a_higher_limit_only_joins(found: np.ndarray, limits: list[float]) -> None:  # type: ignore[type-arg]
    fine, coarse = (agglomerate(found, 0.5, limit)[0] for limit in limits)
    np.testing.assert_array_equal(fine > 0, found > 0.5)
    np.testing.assert_array_equal(coarse > 0, found > 0.5)
    # Each finer cell lies in one coarser cell, and cells are numbered by their first pixels without gaps.
    pairs = np.unique(np.stack([fine.ravel(), coarse.ravel()]), axis=1)
    assert len(np.unique(pairs[0])) == pairs.shape[1]
    for labels in (fine, coarse):
        first = [int(np.flatnonzero(labels.ravel() == number)[0]) for number in range(1, int(labels.max()) + 1)]
        assert first == sorted(first)


def test_the_score_of_cells_that_were_told_apart_is_the_score_of_the_right_ones() -> None:
    found = np.stack([two_cells(0.6), two_cells(0.01)])
    truth = np.stack([two_cells(0.01) > 0.5] * 2).astype(np.uint8)
    plain = score_stack(found, truth, threshold=0.5)
    v_rand, v_info = score_agglomerated(found, truth, threshold=0.5, merge_below=0.2)
    assert plain.v_rand_at_threshold < 0.9
    assert (v_rand, v_info) == pytest.approx((1.0, 1.0), abs=0.01)
    # What has no gaps has the same scores either way.
    alone = score_stack(found[1:], truth[1:], threshold=0.5)
    assert score_agglomerated(found[1:], truth[1:], 0.5, 0.2) == pytest.approx(
        (alone.v_rand_at_threshold, alone.v_info_at_threshold)
    )


def test_pixels_that_nobody_annotated_count_nowhere() -> None:
    """The gap lies where nobody said whether there is a membrane: it joins nothing, whatever the network says there."""
    found, truth = two_cells(0.99), (two_cells(0.01) > 0.5).astype(np.uint8)
    assert score_agglomerated(found[np.newaxis], truth[np.newaxis], 0.5, 0.2)[0] < 0.9
    truth[10:13] = 255
    for says in (0.0, 0.99):
        found[10:13] = says
        assert score_agglomerated(found[np.newaxis], truth[np.newaxis], 0.5, 0.2) == pytest.approx((1.0, 1.0), abs=1e-6)


def test_the_first_piece_is_a_neighbour_like_the_others() -> None:
    """From whichever side: the first cell of a slice may lie above, below, or to either side of the second."""
    for turned in (two_cells(0.85), two_cells(0.85).T, np.ascontiguousarray(two_cells(0.85)[:, ::-1])):
        assert agglomerate(turned, 0.5, 0.2)[1] == 1
    # The upper right cell is met first, and lies to the right of the other one along the gap.
    found = np.full((20, 41), 0.01, np.float32)
    found[:, 21:] = found[5:, :20] = 0.99
    found[10:13, 20] = 0.85
    assert agglomerate(found, 0.5, 0.2)[1] == 1


def test_everything_may_be_one_cell() -> None:
    assert agglomerate(two_cells(0.01 + 0.5), 0.5, 1)[1] == 1
    check_limit(0.0, 0.9)
