from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from unet.errors import UnetError
from unet.volume.overlay import (
    GAP_PX,
    MEMBRANE_COLOUR,
    exactly,
    membrane_overlay,
    note_in_png,
    noted_threshold,
    overlay_png,
)


def test_only_the_membrane_is_tinted_and_the_surer_the_more() -> None:
    image = np.array([[10, 100, 200, 100]], np.uint8)
    picture = membrane_overlay(image, np.array([[1, 0, 0.51, 0.5]]))
    assert picture[0, 0].tolist() == [10] * 3
    assert picture[0, 2].tolist() == [200] * 3
    colour = np.array(MEMBRANE_COLOUR)
    sure, unsure = (np.abs(picture[0, index] - colour.astype(int)).sum() for index in (1, 3))
    assert sure < unsure < np.abs(100 - colour).sum()


def test_the_threshold_moves_the_membrane() -> None:
    image = np.full((2, 2), 100, np.uint8)
    probability = np.full((2, 2), 0.3)
    assert (membrane_overlay(image, probability, 0.2) == 100).all()
    assert (membrane_overlay(image, probability, 0.3) != 100).any()


def test_raw_slice_and_overlay_side_by_side(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40)).astype(np.uint8)
    probability = np.ones((30, 40), np.float16)
    probability[:, 7] = 0
    overlay_png(tmp_path / "a.png", image, probability)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (30, 80 + GAP_PX, 3)
    assert (picture[:, :40] == image[..., None]).all()
    right = picture[:, 40 + GAP_PX :]
    changed = (right != image[..., None]).any(axis=(0, 2))
    assert np.flatnonzero(changed).tolist() == [7]
    assert list(tmp_path.iterdir()) == [tmp_path / "a.png"]


def test_a_large_slice_is_shown_smaller_with_its_thin_membranes(tmp_path: Path) -> None:
    image = np.full((30, 2049), 80, np.uint8)
    probability = np.ones((30, 2049), np.float32)
    probability[:, 1001] = 0
    overlay_png(tmp_path / "a.png", image, probability)
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (15, 2 * 1025 + GAP_PX, 3)
    changed = (picture[:, 1025 + GAP_PX :] != 80).any(axis=(0, 2))
    assert np.flatnonzero(changed).tolist() == [500]


def test_shapes_must_agree(tmp_path: Path) -> None:
    with pytest.raises(UnetError, match=r"a.png cannot show a probability of \(4, 5\) over a slice of \(5, 4\)"):
        overlay_png(tmp_path / "a.png", np.zeros((5, 4), np.uint8), np.zeros((4, 5)))
    assert not list(tmp_path.iterdir())


@given(threshold=st.floats(0, 1), name=st.sampled_from(["", "cells of threshold 3.tif, ", "model version 2 "]))
@example(threshold=1e-05, name="")
@example(threshold=0.1234567, name="")
@example(threshold=0.7, name="cells of threshold 3, ")
def test_a_noted_threshold_is_read_exactly(
    threshold: float, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "noted.png"
    Image.new("L", (1, 1)).save(path)
    note_in_png(path, f"{name}threshold {exactly(threshold)}; threshold the network's; views 1")
    assert noted_threshold(path) == threshold
    assert exactly(0.7) == "0.7"
