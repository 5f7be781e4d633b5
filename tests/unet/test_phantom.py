from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
from hypothesis import given, settings
from hypothesis import strategies as st

from unet.errors import UnetError
from unet.phantom import main, synthetic_stack
from unet.scores import score_stack
from unet.volume import StackReader, load_pair, read_images

Array = npt.NDArray[Any]


@pytest.fixture(scope="module")
def stack() -> tuple[Array, Array]:
    return synthetic_stack(slices=3, size=512, seed=7)


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(16, 80), st.integers(0, 2**32 - 1))
def test_any_size_and_seed(slices: int, size: int, seed: int) -> None:
    images, labels = synthetic_stack(slices, size, seed)
    assert images.shape == labels.shape == (slices, size, size)
    assert images.dtype == labels.dtype == np.dtype(np.uint8)
    assert set(np.unique(labels)) <= {0, 1}


def test_the_same_seed_gives_the_same_stack_and_another_another() -> None:
    first, again, other = (synthetic_stack(2, 64, seed) for seed in (3, 3, 4))
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_it_is_like_the_real_slices_in_figures(stack: tuple[Array, Array]) -> None:
    """ISBI 2012: mean 126, deviation 44, membrane 85 against 138 elsewhere, 22% membrane, 130-137 cells a slice."""
    images, labels = stack
    assert images.mean() == pytest.approx(126, abs=15)
    assert images.std() == pytest.approx(44, abs=6)
    assert images[labels == 0].mean() == pytest.approx(85, abs=12)
    assert images[labels == 1].mean() == pytest.approx(138, abs=18)
    assert (labels == 0).mean() == pytest.approx(0.22, abs=0.05)
    for plane in labels:
        sizes = np.bincount(scipy.ndimage.label(plane)[0].ravel())[1:]
        assert 100 < sizes.size < 260
        # Cells of very different sizes.
        assert sizes.max() > 20 * np.median(sizes[sizes > 20])


def test_membranes_are_closed_and_a_few_pixels_wide(stack: tuple[Array, Array]) -> None:
    for plane in stack[1]:
        depth = scipy.ndimage.distance_transform_edt(plane == 0)
        ridge = depth[(depth == scipy.ndimage.maximum_filter(depth, 3)) & (depth > 0)]
        assert 2 <= np.median(ridge) <= 3.5
        cells, count = scipy.ndimage.label(plane)
        # No cell has swallowed the others through a gap.
        assert np.bincount(cells.ravel())[1:].max() < 0.15 * plane.size
        assert count > 100


def test_slices_evolve(stack: tuple[Array, Array]) -> None:
    labels = stack[1]
    near, far = (labels[0] == labels[1]).mean(), (labels[0] == labels[2]).mean()
    unrelated = (labels[0] == labels[0, ::-1]).mean()
    assert 1 > near > far > unrelated


def test_intensity_alone_does_not_find_the_membrane(stack: tuple[Array, Array]) -> None:
    """Noise and organelles are there to be mistaken for it: a blur and a threshold do badly."""
    images, labels = stack
    blurred = scipy.ndimage.gaussian_filter(images[:1].astype(np.float32) / 255, (0, 1, 1))
    assert score_stack(blurred, labels[:1]).best_v_rand < 0.9


def test_it_is_made_fast() -> None:
    started = time.process_time()
    synthetic_stack(slices=2)
    # 30 slices take four seconds; the bound is for any machine that runs the tests.
    assert time.process_time() - started < 5


def test_what_is_too_small() -> None:
    with pytest.raises(UnetError, match="a synthetic stack of 0 slices of 512 pixels is too small"):
        synthetic_stack(slices=0)
    with pytest.raises(UnetError, match="of 15 pixels is too small"):
        synthetic_stack(slices=1, size=15)


def test_the_command_writes_a_folder_like_isbis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "data"), "--slices", "2", "--size", "64"]) == 0
    names = ["train-volume.tif", "train-labels.tif", "test-volume.tif"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "data" / name) for name in names]
    images, labels = load_pair(tmp_path / "data" / names[0], tmp_path / "data" / names[1])
    expected = synthetic_stack(2, 64, 0)
    assert np.array_equal(images, expected[0])
    assert np.array_equal(labels, expected[1])
    assert set(np.unique(read_images(tmp_path / "data" / names[1]))) == {0, 255}
    with StackReader(tmp_path / "data" / names[2]) as reader:
        assert (len(reader), reader.height, reader.width) == (2, 64, 64)
        assert not np.array_equal(reader[0], images[0])


@pytest.mark.parametrize("module", ["unet.phantom", "unet.scores"])
def test_help_answers_in_under_a_second(module: str) -> None:
    line = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: ")
    # What makes a start slow is what it imports; a time would measure how busy the machine is.
    for heavy in ("scipy.ndimage", "skimage", "tensorflow", "tritonclient", "PIL"):
        assert f" {heavy}\n" not in done.stderr
