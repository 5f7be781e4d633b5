from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from unet.errors import UnetError
from unet.scores import dice, pixel_error, score_stack, thinned_segments, v_rand_v_info
from unet.scores.__main__ import main
from unet.volume import read_labels

Array = npt.NDArray[Any]

# Two cells of 4 x 4 pixels and a membrane of one column between them.
TRUTH = np.ones((4, 9), bool)
TRUTH[:, 4] = False


def test_the_truth_scores_1() -> None:
    assert v_rand_v_info(TRUTH, TRUTH) == pytest.approx((1.0, 1.0))


def test_merged_cells_by_hand() -> None:
    """One segment over two cells: p = (1/2, 1/2), b = (1,), so 0.5 / (0.5 (0.5 + 1)) and no mutual information."""
    assert v_rand_v_info(np.ones_like(TRUTH), TRUTH) == pytest.approx((2 / 3, 0.0))


def test_a_line_through_a_cell_by_hand() -> None:
    """Column 1 of the left cell becomes a line: 4 of its 16 pixels are singletons, n = 32, u = 1/8."""
    proposal = TRUTH.copy()
    proposal[:, 1] = False
    joint = np.array([4, 8, 16]) / 32
    u, n = 4 / 32, 32
    rand = (np.sum(joint**2) + u / n) / (0.5 * (0.5 + np.sum(joint**2) + u / n))
    entropy = -np.sum(joint * np.log(joint)) + u * np.log(n)
    info = 2 * (np.log(2) + entropy - entropy) / (np.log(2) + entropy)
    assert v_rand_v_info(proposal, TRUTH) == pytest.approx((rand, info))


def test_thinning_removes_thickness_but_not_a_gap() -> None:
    thick = TRUTH.copy()
    thick[:, 3:6] = False
    assert (thinned_segments(thick) == np.where(TRUTH, 1 + (np.arange(9) > 4), 0)).all()
    assert v_rand_v_info(thick, TRUTH) == pytest.approx((1.0, 1.0))
    gap = TRUTH.copy()
    gap[1, 4] = True
    assert v_rand_v_info(gap, TRUTH) == pytest.approx((2 / 3, 0.0))


def test_the_empty_proposal_is_all_singletons() -> None:
    """Each of 32 pixels is a segment: H(B) = H(A, B) = ln 32, so I = H(A) = ln 2."""
    expected = (1 / 32) / (0.5 * (0.5 + 1 / 32)), 2 * np.log(2) / (np.log(2) + np.log(32))
    assert v_rand_v_info(np.zeros_like(TRUTH), TRUTH) == pytest.approx(expected)


def test_diagonal_cells_are_two() -> None:
    """Components are 4-connected."""
    corner = np.array([[True, False], [False, True]])
    assert v_rand_v_info(corner, corner) == pytest.approx((1.0, 1.0))
    assert v_rand_v_info(np.ones((2, 2), bool), corner) == pytest.approx((2 / 3, 0.0))


def test_one_cell_against_one() -> None:
    whole = np.ones((3, 3), bool)
    assert v_rand_v_info(whole, whole) == (1.0, 1.0)


def by_definition(proposal: Array, truth: Array) -> tuple[float, float]:
    """The scores with every line pixel a segment of its own, counted one pixel after another."""
    cells = scipy.ndimage.label(truth)[0]
    segments = thinned_segments(proposal)
    joint: Counter[tuple[int, int]] = Counter()
    for number, (cell, segment) in enumerate(zip(cells.ravel(), segments.ravel())):
        if cell:
            joint[int(cell), int(segment) or -1 - number] += 1
    n = joint.total() if sys.version_info >= (3, 10) else sum(joint.values())
    a: Counter[int] = Counter()
    b: Counter[int] = Counter()
    for (cell, segment), count in joint.items():
        a[cell] += count
        b[segment] += count

    def squares(counts: Mapping[Any, int]) -> float:
        return sum((count / n) ** 2 for count in counts.values())

    def entropy(counts: Mapping[Any, int]) -> float:
        return -sum(count / n * math.log(count / n) for count in counts.values())

    information = entropy(a) + entropy(b)
    v_info = 2 * (information - entropy(joint)) / information if information > 1e-12 else 1.0
    return squares(joint) / (0.5 * (squares(a) + squares(b))), v_info


masks = arrays(np.bool_, st.tuples(st.integers(2, 12), st.integers(2, 12)))


@given(proposal=masks, data=st.data())
def test_scores_are_those_of_the_definition(proposal: Array, data: st.DataObject) -> None:
    truth = data.draw(arrays(np.bool_, proposal.shape))
    truth[0, 0] = True
    rand, info = v_rand_v_info(proposal, truth)
    assert (rand, info) == pytest.approx(by_definition(proposal, truth), abs=1e-9)
    assert 0 < rand <= 1 + 1e-9
    assert -1e-9 <= info <= 1 + 1e-9


@given(truth=masks)
def test_a_thin_truth_scores_1_against_itself(truth: Array) -> None:
    """Thinning leaves what is thin already."""
    thin = thinned_segments(truth) > 0
    thin[0, 0] |= not thin.any()
    assert v_rand_v_info(thin, thin) == pytest.approx((1, 1))


@settings(max_examples=20)
@given(data=st.data())
def test_every_score_is_the_mean_over_slices(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(2, 8), st.integers(2, 8)))
    labels = data.draw(arrays(np.uint8, shape, elements=st.integers(0, 1)))
    labels[:, 0, 0] = 1
    # Values between two thresholds and on them: "foreground" is above, not at.
    probability = data.draw(arrays(np.float64, shape, elements=st.sampled_from([0, 0.05, 0.3, 0.5, 0.85, 1])))
    thresholds = (0, 0.3, 0.5, 1)
    scores = score_stack(probability, labels, thresholds)
    for index, threshold in enumerate(thresholds):
        each = [v_rand_v_info(plane > threshold, label > 0) for plane, label in zip(probability, labels)]
        assert (scores.v_rand[index], scores.v_info[index]) == pytest.approx(tuple(np.mean(each, axis=0)))
    assert scores.best_v_rand == max(scores.v_rand)
    assert scores.best_v_info == scores.v_info[thresholds.index(scores.best_v_info_threshold)]


@given(mask=masks)
def test_lines_separate_segments_that_keep_their_pixels(mask: Array) -> None:
    segments = thinned_segments(mask)
    assert segments.shape == mask.shape
    # What was foreground stays so, with its own number.
    labels, count = scipy.ndimage.label(mask)
    assert (segments[mask] == labels[mask]).all()
    # Two different segments never touch ...
    for left, right in ((segments[1:], segments[:-1]), (segments[:, 1:], segments[:, :-1])):
        assert not ((left != right) & (left > 0) & (right > 0)).any()
    assert segments.max(initial=0) == count
    # ... and a line is no wider than that takes: each of its pixels lies between two, or between lines.
    if count == 1:
        assert (segments == 1).all()


def test_dice_and_pixel_error_by_hand() -> None:
    labels = np.array([[0, 0, 1, 1]])
    probability = np.array([[0.1, 0.9, 0.4, 0.8]])
    assert dice(probability, labels) == pytest.approx(2 * 1 / (2 + 2))
    assert pixel_error(probability, labels) == 0.5
    assert dice(np.ones(4), np.ones(4)) == 1.0
    # A value at the threshold is membrane: "not" is what is above it.
    assert dice(np.array([0.5, 0.6]), np.array([0, 1])) == 1.0
    assert pixel_error(np.array([0.5, 0.6]), np.array([0, 1])) == 0.0


def test_the_best_is_taken_for_each_score_on_its_own() -> None:
    probability = np.where(TRUTH, 0.65, 0.25)[np.newaxis]
    scores = score_stack(probability, TRUTH[np.newaxis].astype(np.uint8))
    assert scores.best_v_rand == pytest.approx(1)
    assert scores.best_v_rand_threshold == 0.3
    assert scores.v_rand[0] == pytest.approx(2 / 3)
    assert scores.as_dict()["best_v_info"] == pytest.approx(1)


def test_more_processes_give_the_same() -> None:
    rng = np.random.default_rng(0)
    labels = (scipy.ndimage.gaussian_filter(rng.normal(size=(3, 40, 40)), (0, 4, 4)) > 0).astype(np.uint8)
    probability = np.clip(labels * 0.6 + rng.random(labels.shape) * 0.4, 0, 1)
    assert score_stack(probability, labels, jobs=2) == score_stack(probability, labels)


@pytest.mark.parametrize(
    ("probability", "sentence"),
    [
        (np.zeros((1, 3, 3)), "cannot be scored against"),
        (np.full((1, 4, 9), 2.0), "outside 0 to 1"),
        (np.full((1, 4, 9), np.nan), "outside 0 to 1"),
    ],
)
def test_what_cannot_be_scored(probability: Array, sentence: str) -> None:
    with pytest.raises(UnetError, match=sentence):
        score_stack(probability, TRUTH[np.newaxis])


def test_the_command(tmp_path: Path) -> None:
    for name, plane in (("p.tif", np.where(TRUTH, 0.65, 0.25).astype(np.float32)), ("l.tif", TRUTH * np.uint8(255))):
        tifffile.imwrite(tmp_path / name, np.repeat(plane[np.newaxis], 3, 0), photometric="minisblack")
    line = [sys.executable, "-m", "unet.scores", str(tmp_path / "p.tif"), str(tmp_path / "l.tif")]
    done = subprocess.run([*line, "--pages", "1:3"], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "2 slices: at the threshold 0.5: V_rand thin 1.0000, V_info thin 1.0000, Dice of the membrane 1.0000, "
        "pixel error 0.0000; the challenge's figures, each at the threshold that is best on these very slices: V_rand "
        "thin 1.0000 (at 0.3), V_info thin 1.0000 (at 0.3)\n"
    )
    # Of everything above 0.65 nothing is left; the challenge's figures do not change.
    done = subprocess.run([*line, "--threshold", "0.75", "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["threshold"], found["pixel_error"]) == (0.75, pytest.approx(TRUTH.mean()))
    assert found["v_rand_at_threshold"] < 1 == found["best_v_rand"]
    # As the client notes it: the network's own threshold stands beside the network's version.
    noted = "unet-medical-triton 1.0; model version 2 threshold 0.75; threshold the network's; views 1"
    tifffile.imwrite(tmp_path / "p.tif", tifffile.imread(tmp_path / "p.tif"), photometric="minisblack", software=noted)
    done = subprocess.run([*line, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["threshold"] == 0.75
    done = subprocess.run([*line, "--threshold", "7"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --threshold is 7; it must be from 0 to 1\n")
    done = subprocess.run([*line, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["best_v_info"] == pytest.approx(1)
    done = subprocess.run([*line, "--pages", "1:9"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "error: --pages 1:9 is outside the stack's 0:3\n")


def test_eight_bits_and_any_number_of_processes_give_the_same_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probability = np.repeat(np.where(TRUTH, 153, 51).astype(np.uint8)[np.newaxis], 2, 0)
    tifffile.imwrite(tmp_path / "p8.tif", probability, photometric="minisblack")
    tifffile.imwrite(tmp_path / "p.tif", probability / np.float32(255), photometric="minisblack")
    tifffile.imwrite(tmp_path / "l.tif", np.repeat((TRUTH * np.uint8(255))[np.newaxis], 2, 0), photometric="minisblack")
    said = []
    for words in (["p.tif"], ["p8.tif"], ["p8.tif", "--jobs", "2"]):
        name, *flags = words
        assert main([str(tmp_path / name), str(tmp_path / "l.tif"), "--threshold", "0.3", "--json", *flags]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] == said[2]
    assert said[0]["pixel_error"] == pytest.approx(0)


@pytest.mark.parametrize(("threshold", "said"), [("0", ""), ("1", ""), ("-0.1", "from 0 to 1"), ("1.1", "from 0 to 1")])
def test_a_threshold_is_a_probability(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], threshold: str, said: str
) -> None:
    for name, plane in (("p.tif", TRUTH * np.float32(0.9)), ("l.tif", TRUTH * np.uint8(255))):
        tifffile.imwrite(tmp_path / name, plane, photometric="minisblack")
    assert main([str(tmp_path / "p.tif"), str(tmp_path / "l.tif"), f"--threshold={threshold}"]) == (2 if said else 0)
    assert said in capsys.readouterr().err


def dilated(membrane: Array, times: int) -> Array:
    return np.stack([~scipy.ndimage.binary_dilation(plane, iterations=times) for plane in membrane])


def eroded(membrane: Array) -> Array:
    # Beyond the border the membrane goes on: else each would open there and join its cells.
    return np.stack([~scipy.ndimage.binary_erosion(plane, border_value=1) for plane in membrane])


def resized(labels: Array, size: int) -> Array:
    def there_and_back(plane: Array) -> Array:
        image = Image.fromarray(plane * np.uint8(255))
        small = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(small.resize(image.size, Image.Resampling.BILINEAR)) > 127

    return np.stack([there_and_back(plane) for plane in labels])


def test_the_published_checks_on_the_real_labels(isbi_dir: Path) -> None:
    labels = read_labels(isbi_dir / "train-labels.tif")
    membrane = labels == 0
    expected = {
        "itself": (labels != 0, 1.0, 1.0),
        "dilated once": (dilated(membrane, 1), 0.9992, 0.9987),
        "dilated twice": (dilated(membrane, 2), 0.9980, 0.9967),
        "eroded": (eroded(membrane), 0.9703, 0.9919),
        "resized": (resized(labels, 388), 0.9999, 0.9999),
        "all foreground": (np.ones_like(membrane), 0.078, 0.0),
    }
    for name, (proposal, v_rand, v_info) in expected.items():
        scores = score_stack(proposal.astype(np.float32), labels, thresholds=(0.5,))
        digits = 5e-5 if name != "all foreground" else 5e-4
        assert scores.best_v_rand == pytest.approx(v_rand, abs=digits), name
        assert scores.best_v_info == pytest.approx(v_info, abs=digits), name


def test_the_scores_of_pixels_are_at_the_threshold_that_was_asked_for() -> None:
    probability = np.where(TRUTH, 0.65, 0.25)[np.newaxis]
    for threshold, error, overlap in ((0.5, 0.0, 1.0), (0.75, TRUTH.mean(), 2 / (1 + 1 / (~TRUTH).mean()))):
        scores = score_stack(probability, TRUTH[np.newaxis], threshold=threshold)
        assert scores.threshold == threshold
        assert scores.pixel_error == pytest.approx(error)
        assert scores.dice == pytest.approx(overlap)


def test_a_slice_is_no_stack_and_one_annotated_pixel_counts() -> None:
    with pytest.raises(UnetError, match="cannot be scored against"):
        score_stack(np.ones(TRUTH.shape), TRUTH)
    labels = np.full((1, 2, 2), 255, np.uint8)
    labels[0, 0, 0] = 1
    assert pixel_error(np.zeros((1, 2, 2)), labels) == 1.0


def test_a_proposal_of_another_shape_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "p.tif", np.ones((2, 4, 9), np.float32), photometric="minisblack")
    tifffile.imwrite(tmp_path / "l.tif", TRUTH * np.uint8(255), photometric="minisblack")
    assert main([str(tmp_path / "p.tif"), str(tmp_path / "l.tif")]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {tmp_path / 'p.tif'} is (2, 4, 9) but {tmp_path / 'l.tif'} is (1, 4, 9)\n"


def test_the_threshold_of_the_command_cuts_the_proposal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "p.tif", np.where(TRUTH, 0.65, 0.25).astype(np.float32), photometric="minisblack")
    tifffile.imwrite(tmp_path / "l.tif", TRUTH * np.uint8(255), photometric="minisblack")
    assert main([str(tmp_path / "p.tif"), str(tmp_path / "l.tif"), "--threshold", "0.75", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["threshold"], found["pixel_error"]) == (0.75, pytest.approx(TRUTH.mean()))
