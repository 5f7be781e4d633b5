from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import tifffile

from train.config import TrainConfig
from train.errors import TrainError
from train.input.augmentation import NO_AUGMENTATION, Augmentation
from train.input.dataset import Windows, windows_of
from train.input.pairs import find_pairs
from train.input.store import Slice
from train.model.border import border_weights
from unet.intensity import normalise

LARGE = """
import numpy as np, psutil, sys
from train.input.augmentation import Augmentation
from train.input.dataset import Windows
from train.input.store import Slice, planes

image, label = (planes((1, {side}, {side}), np.uint8, in_memory=False)[0] for _ in range(2))
for row in range(0, {side}, 500):
    image[row : row + 500] = row % 251
    label[row : row + 500] = 1
item = Slice("large", image, label)
item.release()
before = psutil.Process().memory_info().rss
windows = Windows([item], 444, Augmentation(), 0)
for number in range(8):
    windows.window(number)
print((psutil.Process().memory_info().rss - before) // 2**20)
"""


def test_every_round_shows_every_slice_once(slices: list[Slice]) -> None:
    windows = Windows(slices, 188, NO_AUGMENTATION, seed=3)
    rounds = [[windows.slice_index(number) for number in range(start, start + 5)] for start in range(0, 50, 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in rounds)
    assert len({tuple(order) for order in rounds}) > 1


def test_a_window_depends_on_seed_and_number_alone(slices: list[Slice]) -> None:
    windows = Windows(slices, 188, Augmentation(), seed=3)
    again = Windows(slices, 188, Augmentation(), seed=3).window(11)
    for index in range(3):
        np.testing.assert_array_equal(windows.window(11)[index], again[index])
    assert np.abs(windows.window(11)[0] - windows.window(12)[0]).max() > 0


def test_shapes_and_ranges(slices: list[Slice]) -> None:
    image, label, cost = Windows(slices, 204, Augmentation(), seed=0, membrane_weight=3).window(0)
    assert image.shape == (204, 204, 1)
    assert label.shape == cost.shape == (20, 20)
    assert [array.dtype for array in (image, label, cost)] == ["float32", "uint8", "float32"]
    assert image.min() >= -1
    assert image.max() <= 1
    np.testing.assert_array_equal(cost, np.where(label == 0, 3, 1))


def test_the_settings_reach_the_cost(tiny: Callable[..., TrainConfig], slices: list[Slice]) -> None:
    drawn = [dataclasses.replace(item, border=border_weights(item.label, 7).astype(np.float16)) for item in slices]
    _, label, cost = windows_of(tiny(membrane_weight=5.0, tile_size=252), drawn).window(1)
    number = windows_of(tiny(tile_size=252), drawn).slice_index(1)
    border = border_weights(slices[number].label, 7)
    # A window of 68 in a slice of 96: found where it agrees with the label.
    places = [
        (row, col) for row in range(29) for col in range(29)
        if (slices[number].label[row : row + 68, col : col + 68] == label).all()
    ]  # fmt: skip
    ((row, col),) = places
    expected = np.where(label == 0, 5, 1) + border[row : row + 68, col : col + 68]
    np.testing.assert_allclose(cost, expected, atol=0.01)
    assert cost.max() > 6


def test_pixels_that_nobody_annotated_cost_nothing(slices: list[Slice]) -> None:
    hidden = []
    for item in slices:
        label = item.label.copy()
        label[:, :50] = 255
        hidden.append(dataclasses.replace(item, label=label))
    windows = Windows(hidden, 220, Augmentation(), seed=5, membrane_weight=2)
    for number in range(20):
        _, label, cost = windows.window(number)
        np.testing.assert_array_equal(cost == 0, label == 255)
        assert set(np.unique(cost)) <= {0, 1, 2}


def test_windows_are_cut_where_something_is_annotated() -> None:
    label = np.full((600, 600), 255, np.uint8)
    label[300:340, 300:340] = 1
    windows = Windows([Slice("sparse", np.zeros((600, 600), np.uint8), label)], 252, NO_AUGMENTATION, seed=0)
    seen = sum(bool((windows.window(number)[2] > 0).any()) for number in range(40))
    assert seen >= 32  # by chance alone one window in twenty would see it


def test_the_label_is_the_centre_of_the_image(slices: list[Slice]) -> None:
    """With the label drawn into the image, the window's centre must show the window's label."""
    marked = [dataclasses.replace(item, image=item.label * np.uint8(255)) for item in slices]
    image, label, _ = Windows(marked, 220, NO_AUGMENTATION, seed=5).window(2)
    np.testing.assert_array_equal(image[92:-92, 92:-92, 0] > 0, label == 1)


@pytest.mark.parametrize("size", [96, 1200])
def test_image_label_and_cost_go_through_one_map(size: int) -> None:
    """Under all deformations; a large slice is read in part, which must not show."""
    rng = np.random.default_rng(3)
    label = (scipy.ndimage.gaussian_filter(rng.normal(size=(size, size)), 6) > 0).astype(np.uint8)
    item = Slice("blobs", label * np.uint8(255), label, (label * 8).astype(np.float16))
    settings = dataclasses.replace(
        Augmentation(), exact=0.0, brightness=0.0, contrast=0.0, gamma=0.0, blur_px=0.0, noise=0.0
    )
    windows = Windows([item], 284, settings, seed=1)
    for number in range(4):
        image, seen, cost = windows.window(number)
        inner = image[92:-92, 92:-92, 0]
        # The image is read bilinearly: half-way values lie on the edges alone.
        assert np.mean((inner > 0) == (seen == 1)) > 0.98
        np.testing.assert_array_equal(cost, np.where(seen == 1, 9, 1))


def test_a_part_of_a_large_slice_is_read_as_the_whole_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (700, 900), np.uint8)
    item = Slice("noise", image, (image > 60).astype(np.uint8))
    plain = Windows([item], 444, NO_AUGMENTATION, seed=2).window(0)
    whole = [Windows([item], 444, Augmentation(), seed=2).window(number) for number in range(3)]
    monkeypatch.setattr("train.input.dataset._WHOLE_SLICE_PX", 1000)
    again = Windows([item], 444, NO_AUGMENTATION, seed=2).window(0)
    for index in range(3):
        np.testing.assert_array_equal(again[index], plain[index])
    for number, (pixels, label, _) in enumerate(whole):
        part = Windows([item], 444, Augmentation(), seed=2).window(number)
        # OpenCV reads at 1/32 of a pixel, and rounds a place in the slice and one in the part differently.
        assert np.mean(np.abs(part[0] - pixels) < 0.05) > 0.99
        assert np.mean(part[1] == label) > 0.995


@pytest.mark.parametrize(
    "part", ["elastic_px", "rotation", "flip", "min_scale", "brightness", "contrast", "gamma", "blur_px", "noise"]
)
def test_augmentation_does_all_that_it_says(slices: list[Slice], part: str) -> None:
    """Each part by itself changes a window, beside one in which nothing is changed."""
    nothing = dataclasses.asdict(NO_AUGMENTATION)
    only = Augmentation(**{**nothing, "exact": 0.0, part: getattr(Augmentation(), part)})
    plain, deformed = Windows(slices, 252, NO_AUGMENTATION, 1), Windows(slices, 252, only, 1)
    assert max(np.abs(deformed.window(number)[0] - plain.window(number)[0]).max() for number in range(6)) > 0.05


def test_half_of_the_windows_show_the_slices_own_pixels(slices: list[Slice]) -> None:
    settings = dataclasses.replace(Augmentation(), brightness=0.0, contrast=0.0, gamma=0.0, blur_px=0.0, noise=0.0)
    windows = Windows(slices, 204, settings, seed=2)
    values = {np.float32(value) for item in slices for value in np.unique(normalise(item.image))}
    own = sum(set(np.unique(windows.window(number)[0])) <= values for number in range(60))
    assert 20 <= own <= 40


def test_the_flag_switches_augmentation(tiny: Callable[..., TrainConfig], slices: list[Slice]) -> None:
    assert windows_of(tiny(augment=True), slices).settings == Augmentation()
    assert windows_of(tiny(), slices).settings == NO_AUGMENTATION


def test_the_memory_of_a_window_does_not_grow_with_the_slice(project_root: Path, tmp_path: Path) -> None:
    assert grown_mib(8000, project_root, tmp_path) < 40  # the slice and its label are 122 MiB


@pytest.mark.slow
def test_the_memory_of_a_window_does_not_grow_with_a_slice_of_40_000(project_root: Path, tmp_path: Path) -> None:
    """Sides above 32,766 are beyond OpenCV."""
    if os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize < 5e9:
        pytest.skip("needs 5 GB of disk")
    assert grown_mib(40_000, project_root, tmp_path) < 40


def grown_mib(side: int, project_root: Path, tmp_path: Path) -> int:
    environment = {**os.environ, "PYTHONPATH": str(project_root), "TMPDIR": str(tmp_path)}
    line = [sys.executable, "-c", LARGE.format(side=side)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_ranks_share_the_stream_without_overlap(slices: list[Slice]) -> None:
    windows = Windows(slices, 188, Augmentation(), seed=0)
    whole = [next(iter(windows.batches(first, 4, 4)))[0].numpy() for first in (0, 4)]
    for rank in range(2):
        batches = iter(windows.batches(rank * 2, 2, 4, threads=2))
        for expected in whole:
            np.testing.assert_array_equal(next(batches)[0].numpy(), expected[rank * 2 : rank * 2 + 2])


def test_no_thread_sleeps_by_the_wall_clock(slices: list[Slice]) -> None:
    """That of TensorFlow's autotuning does, and a run waits for it at its end, however far the clock was set back."""
    batches = Windows(slices, 188, Augmentation(), seed=0).batches(0, 1, 1)
    assert batches.options().autotune.enabled is False


def test_missing_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="no training stack in"):
        find_pairs(tmp_path)
    tifffile.imwrite(tmp_path / "train-volume.tif", np.zeros((2, 4, 4), np.uint8), photometric="minisblack")
    with pytest.raises(TrainError, match=r"train-labels\.tif does not exist"):
        find_pairs(tmp_path)
