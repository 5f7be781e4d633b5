from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from train.errors import TrainError
from train.evaluation import average_over_symmetries, make_predictor
from train.input.store import Slice
from train.model.network import build_unet
from train.scoring import Tally, sample, tally, training_scores
from unet.phantom import synthetic_stack
from unet.scores import score_stack

Array = npt.NDArray[Any]


class Proposals:
    """A stand-in for the network: a given probability for each slice, told apart by its image."""

    def __init__(self, slices: list[Slice], spread: float = 0.7) -> None:
        rng = np.random.default_rng(5)
        self.of = {
            item.image.tobytes(): np.clip(item.label + rng.uniform(-spread, spread, item.label.shape), 0, 1).astype(
                np.float32
            )
            for item in slices
        }

    def __call__(self, image: Array) -> Array:
        return self.of[image.tobytes()]


def test_the_sums_are_the_scores_of_the_stack(slices: list[Slice]) -> None:
    proposals = Proposals(slices)
    found = tally(proposals, slices)
    expected = score_stack(np.stack([proposals(item.image) for item in slices]), np.stack([i.label for i in slices]))
    np.testing.assert_allclose(found.v_rand, expected.v_rand)
    np.testing.assert_allclose(found.v_info, expected.v_info)
    assert found.at(0.5)["dice"] == pytest.approx(expected.dice)
    assert found.at(0.5)["pixel_error"] == pytest.approx(expected.pixel_error)
    # Ranks add up what each of them scored.
    parts = Tally(tally(proposals, slices[::2]).sums + tally(proposals, slices[1::2]).sums)
    np.testing.assert_allclose(parts.sums, found.sums)


def test_pixels_that_nobody_annotated_count_nowhere(slices: list[Slice]) -> None:
    label = slices[0].label.copy()
    label[40:60] = 255
    item = dataclasses.replace(slices[0], label=label)
    proposals = Proposals(slices)
    sums = tally(proposals, [item]).sums
    proposals.of[item.image.tobytes()] = proposals(item.image).copy()
    for value in (0.0, 1.0):
        proposals(item.image)[40:60] = value
        np.testing.assert_array_equal(tally(proposals, [item]).sums, sums)


def curves(v_rand: list[float], v_info: list[float], wrong: Sequence[float] = (0.0,) * 11) -> Tally:
    """Of two slices with 100 pixels."""
    sums = np.zeros((8, 11))
    sums[0] = 2
    sums[1:3] = np.multiply(2, [v_rand, v_info])
    sums[6], sums[7] = np.multiply(100, wrong), 100
    return Tally(sums)


FLAT = [0.0, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.0]


def test_of_equal_thresholds_the_nearest_to_one_half_is_taken() -> None:
    # What 0 and 1 give, which tell nothing apart, counts nowhere.
    assert curves([2.0, *FLAT[1:10], 2.0], FLAT).best_threshold == 0.5


@pytest.mark.parametrize("which", [0, 1])
def test_a_threshold_that_its_neighbours_do_not_support_is_not_taken(which: int) -> None:
    """A gap in one cell's membrane may close there alone."""
    scores = [FLAT, FLAT]
    scores[which] = [0.0, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.6, 0.91, 0.0]
    assert curves(*scores).best_threshold == 0.5


@pytest.mark.parametrize("others", [0.1, 0.88])
def test_a_threshold_that_is_better_is_taken_whatever_its_neighbours_are(others: float) -> None:
    """A network that was trained shortly answers with probabilities near one value."""
    narrow = [0.0, *[others] * 6, 0.9, *[others] * 2, 0.0]
    assert curves(narrow, narrow).best_threshold == 0.7


@pytest.mark.parametrize(("error", "expected"), [(0.01, 0.8), (0.03, 0.7)])
def test_the_pixel_error_is_weighed_against_the_scores(error: float, expected: float) -> None:
    v_rand = [0.0, 0.5, 0.5, 0.5, 0.5, 0.9, 1.0, 1.0, 1.0, 1.0, 0.0]
    # With those around them 0.7 has (0.9 + 4 * 1.0) / 5 + 0.9 = 1.88, and 0.8 and 0.9 have 1.9.
    assert curves(v_rand, FLAT, [0.0] * 8 + [error, 1.0, 1.0]).best_threshold == expected


def test_the_scores_at_a_threshold_and_the_challenges_own_are_told() -> None:
    found = curves([0.0, 0.1, 0.4, 0.5, 0.5, 0.5, 0.5, 0.5, 0.75, 0.5, 0.0], [0.1, 0.4, 0.4, *[0.5] * 6, 0.25, 1.95])
    assert found.as_dict(0.3)["v_rand_at_threshold"] == 0.5
    assert found.as_dict(0.3)["best_v_rand"] == 0.75
    assert found.as_dict(0.3)["best_v_info_threshold"] == 1.0
    # Networks are compared where they are best, between 0 and 1.
    assert found.highest == 1.25


def test_four_corners_spread_over_the_training_slices_choose_the_threshold() -> None:
    label = np.ones((40, 1100), np.uint8)
    label[::8] = label[:, ::8] = 0
    of = {}
    for index in range(10):
        # Only where it looks is 0.7 the one that parts membrane from cells.
        high = np.where(label == 0, 0.65, 0.75) if index in (0, 2, 5, 7) else np.where(label == 0, 0.15, 0.25)
        high[:, 1024:] = np.where(label[:, 1024:] == 0, 0.15, 0.25)
        of[index] = high.astype(np.float32)

    def predict(image: Array) -> Array:
        return of[int(image[0, 0])][: image.shape[0], : image.shape[1]]

    training = [Slice(str(index), np.full(label.shape, index, np.uint8), label) for index in range(10)]
    assert training_scores(predict, training).best_threshold == pytest.approx(0.7)


@pytest.mark.parametrize(("low", "high", "blank"), [(0.81, 0.88, True), (0.05, 0.09, True), (0.78, 0.83, False)])
def test_a_network_that_tells_nothing_apart_is_known(low: float, high: float, blank: bool) -> None:
    label = np.ones((20, 20), np.uint8)
    label[:, 5] = 0
    label[0] = 255  # nobody knows
    item = Slice("a", np.zeros((20, 20), np.uint8), label)
    found = tally(lambda image: np.where(label == 0, low, high).astype(np.float32), [item])
    assert found.is_blank is blank


def test_a_network_that_says_0_of_some_pixels_tells_nothing_apart_if_no_threshold_does() -> None:
    label = np.ones((20, 20), np.uint8)
    label[:, 5] = 0
    item = Slice("a", np.zeros((20, 20), np.uint8), label)
    assert tally(lambda image: np.where(label == 0, 0, 0.05).astype(np.float32), [item]).is_blank


def test_no_membrane_where_there_is_none_is_right() -> None:
    label = np.ones((20, 20), np.uint8)
    found = tally(lambda image: np.ones(image.shape, np.float32), [Slice("cell", label, label)])
    assert found.at(0.5)["dice"] == 1


def test_without_cells_the_membrane_decides() -> None:
    label = np.zeros((20, 20), np.uint8)
    item = Slice("membrane", np.zeros((20, 20), np.uint8), label)
    found = tally(lambda image: np.full(image.shape, 0.25, np.float32), [item])
    assert np.isnan(found.v_rand).all()
    assert found.best_threshold == 0.5
    assert found.at(0.2)["dice"] == 0
    # As much as V_rand + V_info of a perfect proposal: networks, and slices, are compared by it.
    assert (found.order(0.2), found.order(0.3), found.highest) == (0, 2, 2)


def test_a_large_slice_is_scored_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (300, 260), np.uint8)
    item = Slice("noise", image, (image > 60).astype(np.uint8))
    model = build_unet(2, seed=1)
    predict = make_predictor(model)
    whole = tally(predict, [item])
    monkeypatch.setattr("train.scoring._BLOCK_PX", 160)
    blocks = tally(predict, [item])
    # Each pixel is predicted from the same surroundings, so what is counted by pixels is the same.
    np.testing.assert_allclose(blocks.sums[3:], whole.sums[3:], atol=2)
    assert blocks.sums[0].max() == 4
    monkeypatch.setattr("train.scoring._BLOCK_PX", 96)
    blocks = tally(predict, [item])
    np.testing.assert_allclose(blocks.sums[3:], whole.sums[3:], atol=2)
    assert blocks.sums[0].max() == 12
    # Blocks that nobody annotated are not predicted at all.
    label = np.full_like(item.label, 255)
    label[100:110, 200:210] = 1
    predicted: list[tuple[int, ...]] = []

    def noting(image: Array) -> Array:
        predicted.append(image.shape)
        return np.zeros(image.shape, np.float32)

    tally(noting, [Slice("a few", image, label)])
    assert len(predicted) == 1


def test_a_network_that_answers_with_no_number_is_refused(slices: list[Slice]) -> None:
    model = build_unet(2)
    model.get_layer("logits").bias.assign([float("nan"), 0.0])
    with pytest.raises(TrainError, match=r"answers 100.0% of a slice with values that are not numbers"):
        tally(make_predictor(model), slices[:1])


def test_the_mean_over_symmetries_turns_every_answer_back() -> None:
    """A network that returns the image itself, brightened by its own orientation, gives the image back."""
    image = np.random.default_rng(1).integers(0, 256, (30, 40), np.uint8)
    same = average_over_symmetries(lambda turned: turned.astype(np.float32))
    np.testing.assert_allclose(same(image), image, rtol=1e-6)
    seen = []

    def first_row(turned: Array) -> Array:
        seen.append(turned.shape)
        answer = np.zeros(turned.shape, np.float32)
        answer[0] = 8
        return answer

    answer = average_over_symmetries(first_row)(image)
    # Each side is the first row of two of the eight.
    assert sorted(set(seen)) == [(30, 40), (40, 30)]
    assert len(seen) == 8
    for side in (answer[0, 1:-1], answer[-1, 1:-1], answer[1:-1, 0], answer[1:-1, -1]):
        np.testing.assert_array_equal(side, 2)
    assert answer[1:-1, 1:-1].max() == 0


def test_tiles_of_every_size_give_one_answer(tmp_path: Path) -> None:
    image = np.random.default_rng(2).integers(0, 256, (90, 120), np.uint8)
    predict = make_predictor(build_unet(2, seed=4))
    answer = predict(image)
    assert answer.shape == image.shape
    assert answer.dtype == np.float32
    assert 0 < answer.min() < answer.max() < 1


def test_few_validation_slices_are_all_scored(slices: list[Slice]) -> None:
    chosen = sample(slices)
    assert [one is other for one, other in zip(chosen, slices, strict=True)] == [True] * 5
    assert sample([]) == []


def test_of_many_validation_slices_some_are_scored() -> None:
    plane = np.zeros((512, 512), np.uint8)
    many = [Slice(f"x[{page}]", plane, plane) for page in range(64)]
    assert [item.name for item in sample(many[:8])] == [f"x[{page}]" for page in range(8)]
    assert [item.name for item in sample(many)] == [f"x[{page}]" for page in range(4, 64, 8)]
    assert sample(many)[0] is many[4]


def test_of_a_large_validation_slice_an_annotated_square_is_scored() -> None:
    rng = np.random.default_rng(0)
    image, label = rng.integers(0, 256, (2500, 2100), np.uint8), np.full((2500, 2100), 255, np.uint8)
    label[100:2300, 1100:2100] = rng.integers(0, 2, (2200, 1000))
    (square,) = sample([Slice("x[0]", image, label)])
    # The columns 1076 to 2100 have most, and of the rows 0, 1024 and 1476 the second has all annotated.
    np.testing.assert_array_equal(square.image, image[1024 - 92 : 2048 + 92, 1076 - 92 :])
    assert np.count_nonzero(square.label != 255) == 1024 * 1000
    np.testing.assert_array_equal(square.label[92:-92, 92:], label[1024:2048, 1076:])
    # All the same: the middle.
    (square,) = sample([Slice("x[0]", image, np.ones((2500, 2100), np.uint8))])
    assert np.count_nonzero(square.label != 255) == 1024**2
    np.testing.assert_array_equal(square.image, image[1024 - 92 : 2048 + 92, 1024 - 92 : 2048 + 52])


def test_a_square_scores_as_it_does_within_its_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = synthetic_stack(slices=1, size=400, seed=3)
    monkeypatch.setattr("train.scoring._VALIDATED_PX", 1)
    monkeypatch.setattr("train.scoring._VALIDATED_SIDE_PX", 200)

    def around(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """An answer that depends on what is 90 pixels away."""
        return (np.roll(image, -90, axis=0) / 255).astype(np.float32)

    (square,) = sample([Slice("x[0]", images[0], labels[0])])
    quarter = np.full_like(labels[0], 255)
    quarter[:200, :200] = labels[0][:200, :200]
    expected = tally(around, [Slice("x[0]", images[0], quarter)])
    np.testing.assert_array_equal(tally(around, [square]).sums, expected.sums)
    assert expected.sums[-1].tolist() == [200 * 200] * len(expected.thresholds)
