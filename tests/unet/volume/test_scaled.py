from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unet.volume import open_volume
from unet.volume.scaled import ScaledRows, ScaledVolume, scaling


class Plane:
    """One slice in memory."""

    def __init__(self, pixels: npt.NDArray[Any]) -> None:
        self.pixels = pixels

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        return self.pixels[row0:row1]


def scaled(pixels: npt.NDArray[Any], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    height, width = pixels.shape
    return ScaledRows(Plane(pixels), (height, width), size).read(0, 0, size[0])


def test_a_pixel_is_shared_by_those_that_it_becomes() -> None:
    """Doubling puts two pixels at a quarter and three quarters of the way; halving takes 1, 3, 3 and 1 eighths."""
    low, _, matrix = scaling(4, 8, 3, 5)
    np.testing.assert_allclose(matrix.toarray()[:, 1 - low : 3 - low], [[0.75, 0.25], [0.25, 0.75]])
    low, _, matrix = scaling(8, 4, 1, 2)
    np.testing.assert_allclose(matrix.toarray()[:, 1 - low : 5 - low], [[1 / 8, 3 / 8, 3 / 8, 1 / 8]])


@pytest.mark.parametrize(("size", "error"), [((40, 60), 1e-4), ((83, 120), 1e-4), ((20, 30), 1e-4), ((23, 31), 0.2)])
def test_ramps_stay_ramps_and_flat_stays_flat(size: tuple[int, int], error: float) -> None:
    rows, columns = np.mgrid[:40, :60].astype(np.float32)
    expected_rows, expected_columns = np.mgrid[: size[0], : size[1]]
    inner = (slice(3, -3), slice(3, -3))
    found = scaled(rows + 2 * columns, size)
    expected = ((expected_rows + 0.5) * 40 / size[0] - 0.5) + 2 * ((expected_columns + 0.5) * 60 / size[1] - 0.5)
    np.testing.assert_allclose(found[inner], expected[inner], atol=error)
    np.testing.assert_allclose(scaled(np.full((40, 60), 7.0), size), 7, rtol=1e-6)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 90), st.integers(1, 90), st.integers(1, 20))
def test_parts_put_together_equal_the_whole(height: int, width: int, rows: int, columns: int, step: int) -> None:
    pixels = np.random.default_rng(0).random((height, width))
    view = ScaledRows(Plane(pixels), (height, width), (rows, columns))
    whole = view.read(0, 0, rows)
    parts = [view.read(0, row0, min(rows, row0 + step)) for row0 in range(0, rows, step)]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=1e-6, atol=1e-7)
    assert pixels.min() - 1e-6 <= whole.min() <= whole.max() <= pixels.max() + 1e-6


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_a_scaled_volume_keeps_its_pixel_format(tmp_path: Path, dtype: npt.DTypeLike) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 30, 40)).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    with open_volume(tmp_path / "a.tif") as original:
        volume = ScaledVolume(original, 45, 30)
        assert (volume.pages, volume.height, volume.width, volume.dtype) == (2, 45, 30, dtype)
        found, due = volume[1], scaled(pixels[1], (45, 30))
        assert found.dtype == dtype
        # Whole numbers are rounded, fractions stay.
        np.testing.assert_array_equal(found, due if dtype == np.float32 else np.rint(due).astype(dtype))
        assert volume.fingerprint() == original.fingerprint()
