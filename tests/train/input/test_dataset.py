from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from train.input.augmentation import NO_AUGMENTATION, Augmentation
from train.input.dataset import FOLDS, DataError, Slice, Windows, find_pairs, fold_of, load_slices


@given(count=st.integers(0, 200))
def test_folds_partition_the_slices(count: int) -> None:
    assert [index for fold in range(FOLDS) for index in fold_of(count, fold)] == list(range(count))


def test_fold_4_of_the_challenge_is_24_to_29() -> None:
    assert list(fold_of(30, 4)) == [24, 25, 26, 27, 28, 29]


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
    image, label, cost = Windows(slices, 204, Augmentation(), seed=0).window(0)
    assert image.shape == (204, 204, 1)
    assert label.shape == cost.shape == (20, 20)
    assert [array.dtype for array in (image, label, cost)] == ["float32", "uint8", "float32"]
    assert image.min() >= -1
    assert image.max() <= 1
    np.testing.assert_array_equal(cost, np.where(label == 0, 3, 1))


def test_the_label_is_the_centre_of_the_image(slices: list[Slice]) -> None:
    """With the label drawn into the image, the window's centre must show the window's label."""
    marked = [dataclasses.replace(item, image=item.label * np.uint8(255)) for item in slices]
    image, label, _ = Windows(marked, 220, NO_AUGMENTATION, seed=5).window(2)
    np.testing.assert_array_equal(image[92:-92, 92:-92, 0] > 0, label == 1)


def test_ranks_share_the_stream_without_overlap(slices: list[Slice]) -> None:
    windows = Windows(slices, 188, Augmentation(), seed=0)
    whole = [next(iter(windows.batches(first, 4, 4)))[0].numpy() for first in (0, 4)]
    for rank in range(2):
        batches = iter(windows.batches(rank * 2, 2, 4, threads=2))
        for expected in whole:
            np.testing.assert_array_equal(next(batches)[0].numpy(), expected[rank * 2 : rank * 2 + 2])


def test_several_stacks_and_uint16(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, dtype, top, shape in (("a", np.uint8, 255, (2, 40, 50)), ("b", np.uint16, 4000, (3, 30, 20))):
        images, labels = rng.integers(0, top, shape).astype(dtype), (rng.random(shape) > 0.2).astype(np.uint8)
        tifffile.imwrite(tmp_path / f"{name}-volume.tif", images, photometric="minisblack")
        tifffile.imwrite(tmp_path / f"{name}-labels.tif", labels, photometric="minisblack")
    loaded = load_slices(find_pairs(tmp_path))
    assert [name for name, _, _ in loaded] == [f"a-volume.tif[{i}]" for i in range(2)] + [
        f"b-volume.tif[{i}]" for i in range(3)
    ]
    assert all(image.dtype == np.uint8 and image.shape == label.shape for _, image, label in loaded)
    # The window of the 12-bit stack fills the range.
    assert max(image.max() for name, image, _ in loaded if name.startswith("b")) == 255


def test_missing_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training stack in"):
        find_pairs(tmp_path)
    tifffile.imwrite(tmp_path / "train-volume.tif", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(DataError, match=r"train-labels\.tif does not exist"):
        find_pairs(tmp_path)
