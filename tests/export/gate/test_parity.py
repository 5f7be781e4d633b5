from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.errors import ParityError
from export.gate.parity import (
    BFLOAT,
    HALF_ARITHMETIC,
    HALF_WEIGHTS,
    LOGITS,
    SAME_TYPE,
    Tolerance,
    check_order,
    compare,
    worst,
)
from export.gate.tiles import Tiles
from export.steps.graph import write_model
from export.steps.reference import Reference
from unet.engine.cpu import CpuEngine, EngineChoice

ANY = Tolerance("probability", 1.0, 1.0, "a test")


def planes(value: float, count: int = 2) -> np.ndarray[Any, np.dtype[np.float16]]:
    return np.full((count, 1, 4, 4), value, np.float16)


def test_figures_by_hand() -> None:
    expected, found = planes(0.25), planes(0.25)
    found[1, 0, 2, 3] = 0.75
    result = compare("step", "parent", [found, found[:1]], [expected, expected[:1]], ANY)
    assert result.max_difference == 0.5
    assert result.mean_difference == pytest.approx(0.5 / 48)
    assert result.flipped_share == pytest.approx(1 / 48)
    assert (result.worst_tile, result.tiles) == (1, 3)
    assert result.accepted
    assert result.as_dict() == {
        "step": "step",
        "against": "parent",
        "quantity": "probability",
        "max_difference": 0.5,
        "max_accepted": ANY.max_difference,
        "mean_difference": result.mean_difference,
        "flipped_share": result.flipped_share,
        "flipped_accepted": ANY.flipped_share,
        "worst_tile": 1,
        "tiles": 3,
        "accepted": True,
        "reason": ANY.reason,
    }


def test_logits_are_relative_to_the_largest_and_flip_by_the_larger_class() -> None:
    expected = np.zeros((1, 2, 4, 4), np.float32)
    expected[0, 1] = 8.0
    found = expected + np.float32(4e-5)
    result = compare("step", "parent", [found], [expected], LOGITS)
    assert result.max_difference == pytest.approx(5e-6, rel=0.02)
    assert result.flipped_share == 0
    assert result.accepted
    swapped = compare("step", "parent", [expected[:, ::-1]], [expected], LOGITS)
    assert swapped.flipped_share == 1
    assert not swapped.accepted
    assert result.mean_difference == pytest.approx(5e-6, rel=0.02)
    # The larger class counts, whatever the logits are: here both are above one half, and then both below.
    for low in (3.0, -9.0):
        first, second = np.full((2, 1, 2, 2, 2), low, np.float32)
        first[:, 0], second[:, 1] = low + 1, low + 1
        second[0, :, 0, 0] = first[0, :, 0, 0]
        assert compare("step", "parent", [first], [second], LOGITS).flipped_share == 0.75


@settings(deadline=None)
@given(error=st.floats(0, 1), position=st.integers(0, 31), allowed=st.floats(0, 1))
def test_it_accepts_exactly_what_is_within_the_tolerance(error: float, position: int, allowed: float) -> None:
    expected = np.zeros((2, 1, 4, 4), np.float64)
    found = expected.copy()
    found.flat[position] = error
    result = compare("step", "parent", [found], [expected], dataclasses.replace(ANY, max_difference=allowed))
    assert result.max_difference == error
    assert result.accepted == (error <= allowed)
    if error:
        assert result.worst_tile == position // 16


def test_flipped_pixels_alone_are_refused_with_the_share() -> None:
    expected, found = planes(0.499), planes(0.501)
    assert compare("step", "parent", [found], [expected], ANY).accepted
    with pytest.raises(ParityError, match=r"a share of 1\.00e\+00 of its pixels changes sides, 1e-03 is the most"):
        compare("step", "parent", [found], [expected], HALF_WEIGHTS).check()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["step", "parent"])
def test_nan_and_infinities_are_refused_on_either_side(bad: float, side: str) -> None:
    pair = {"step": planes(0.5), "parent": planes(0.5)}
    pair[side][0, 0, 0, 0] = bad
    with pytest.raises(ParityError, match=f"{side} gives 1 values that are NaN or infinite"):
        compare("step", "parent", [pair["step"]], [pair["parent"]], ANY)


def test_another_shape_or_nothing_to_compare_is_refused() -> None:
    for found, expected in (([planes(0, 1)], [planes(0, 2)]), ([], [planes(0)]), ([], [])):
        shapes = [str([list(one.shape) for one in side]) for side in (found, expected)]
        with pytest.raises(
            ParityError, match=re.escape(f"step gives the shapes {shapes[0]} where parent gives {shapes[1]}")
        ):
            compare("step", "parent", found, expected, ANY)


def test_tolerances_tighten_with_the_precision() -> None:
    ordered = [SAME_TYPE, HALF_WEIGHTS, HALF_ARITHMETIC, BFLOAT]
    assert sorted(ordered, key=lambda one: one.max_difference) == ordered
    assert LOGITS.max_difference == 1e-5
    assert HALF_WEIGHTS.max_difference == 5e-3


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        ("down0_conv1/Conv.1", lambda w: -w),
        ("down4_conv2/Conv.1", lambda w: w * np.float32(1.05)),
        ("up0_conv2/Conv.2", lambda w: w + np.float32(0.05)),
    ],
    ids=["sign", "deep scale", "bias"],
)
def test_a_corrupted_weight_is_refused_with_the_figure(
    single: Any, reference: Reference, tiles: Tiles, tmp_path: Path, layer: str, change: Any, change_constant: Any
) -> None:
    model = copy.deepcopy(single)
    change_constant(model, layer, change)
    write_model(model, tmp_path / "model.onnx")
    engine = CpuEngine(tmp_path / "model.onnx", EngineChoice("onnxruntime", "f32"))
    found = [engine.infer(batch) for batch in tiles.batches]
    result = compare("ONNX", "SavedModel", found, [reference.probability(b) for b in tiles.batches], SAME_TYPE)
    with pytest.raises(ParityError) as caught:
        result.check()
    sentence = f"its probabilities differ by {result.max_difference:.2e}, 5e-04 is the most accepted"
    assert str(caught.value) == f"ONNX does not agree with SavedModel: {sentence}"


def test_one_pixel_of_a_small_tile_may_change_sides() -> None:
    expected, found = planes(0.499, 1), planes(0.499, 1)
    found[0, 0, 0, 0] = 0.501
    compare("step", "parent", [found], [expected], HALF_WEIGHTS).check()
    found[0, 0, 0, 1] = 0.501
    with pytest.raises(ParityError, match="a share of"):
        compare("step", "parent", [found], [expected], HALF_WEIGHTS).check()


def test_several_comparisons_are_told_by_the_worst_of_each_figure() -> None:
    close, flipped, far = planes(0.499), planes(0.501), planes(0.9)
    rows = [compare("a", "b", [one], [close], ANY) for one in (close, flipped)] + [compare("a", "b", [far], [far], ANY)]
    far_off = compare("a", "b", [planes(0.1)], [close], ANY)
    found = worst("all", [*rows, far_off])
    assert (found.step, found.max_difference) == ("all", far_off.max_difference)
    assert (far_off.flipped_share, found.flipped_share) == (0, 1)
    assert found.mean_difference == far_off.mean_difference > rows[1].mean_difference > 0
    assert worst("all", rows[::-1]).mean_difference == rows[1].mean_difference


def test_answers_in_another_order_are_told_from_those_that_are_only_coarse() -> None:
    due = np.stack([planes(value, 1)[0] for value in (0.1, 0.5, 0.50048828125, 0.9)])
    coarse = due + np.float16(2**-13)
    check_order("step", coarse, due)
    for order in ([1, 0, 2, 3], [0, 2, 1, 3], [1, 2, 3, 0]):
        with pytest.raises(ParityError, match="answers are swapped"):
            check_order("step", due[order], due)
    # What cannot be told apart is not refused.
    check_order("step", planes(0.5, 3), planes(0.5, 3))
