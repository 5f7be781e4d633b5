from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from train.charts import augmentation_sheet, learning_curve, threshold_curve
from train.input.augmentation import NO_AUGMENTATION, Augmentation
from train.input.dataset import Windows
from train.input.store import Slice
from train.run.log import RunLog
from train.scoring import tally
from unet.volume.overlay import membrane_overlay


def test_the_learning_curve_needs_a_loss(tmp_path: Path) -> None:
    log = RunLog(tmp_path, active=True)
    log.event("PARAMETER", "begins", seed=0)
    assert learning_curve(tmp_path) is None
    sizes = []
    scores = {"v_rand": 0.7, "v_info": 0.8, "dice": 0.6}
    for step, data in [(10, {"loss": 0.7}), (20, {"loss": 0.5}), (20, scores)]:
        log.event(step, "", **data)
        picture = learning_curve(tmp_path)
        assert picture == tmp_path / "learning_curve.png"
        with Image.open(picture) as opened:
            sizes.append(len(np.unique(np.asarray(opened.convert("RGB")).reshape(-1, 3), axis=0)))
    # The scores bring more colours.
    assert sizes[2] > sizes[1]


def test_the_threshold_curve_holds_the_scores(slices: list[Slice], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def noisy(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        label = next(item.label for item in slices if item.image is image or (item.image == image).all())
        return np.clip(label + rng.uniform(-0.45, 0.45, label.shape), 0, 1).astype(np.float32)

    scores = tally(noisy, slices[:2])
    threshold_curve(scores, 0.7, tmp_path / "scores-96x96.json")
    with (tmp_path / "scores-96x96.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["threshold"]) for row in rows] == list(scores.thresholds)
    assert [float(row["v_rand_thin"]) for row in rows] == list(scores.v_rand)
    assert [float(row["v_info_thin"]) for row in rows] == list(scores.v_info)
    assert [float(row["pixel_error"]) for row in rows] == list(scores.pixel_error)
    with Image.open(tmp_path / "scores-96x96.png") as opened:
        assert opened.size == (770, 440)


def test_the_sheet_shows_the_windows_that_training_begins_with(slices: list[Slice], tmp_path: Path) -> None:
    windows = Windows(slices, 204, Augmentation(), seed=4)
    augmentation_sheet(windows, tmp_path / "sheet.png", rows=2, columns=3)
    with Image.open(tmp_path / "sheet.png") as opened:
        sheet = np.asarray(opened)
    assert sheet.shape == (2 * 210 - 6, 3 * 210 - 6, 3)
    image, label, _ = windows.window(4)  # the second row's second
    grey = np.asarray(np.rint((image[..., 0] + 1) * 127.5), np.uint8)
    place = sheet[210:414, 210:414]
    np.testing.assert_array_equal(place[:92], np.repeat(grey[:92, :, np.newaxis], 3, axis=-1))
    inner = slice(93, 111)
    drawn = membrane_overlay(grey[inner, inner], label[1:-1, 1:-1])
    np.testing.assert_array_equal(place[inner, inner], drawn)
    assert (label == 0).any()


def test_without_augmentation_the_sheet_is_the_slices(slices: list[Slice], tmp_path: Path) -> None:
    windows = Windows(slices, 188, NO_AUGMENTATION, seed=4)
    augmentation_sheet(windows, tmp_path / "sheet.png", rows=1, columns=2)
    with Image.open(tmp_path / "sheet.png") as opened:
        assert opened.size == (2 * 194 - 6, 188)
