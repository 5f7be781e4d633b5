from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from unet.intensity import IntensityError, normalise, to_uint8, window_of


def test_normalise_covers_minus_one_to_one() -> None:
    values = normalise(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.arange(256) / 127.5 - 1, atol=1e-6)


def test_uint8_stays_without_a_window() -> None:
    image = np.arange(256, dtype=np.uint8)
    assert to_uint8(image) is image


def test_a_window_is_linear_and_clips() -> None:
    image = np.array([0, 1000, 2000, 3000, 9000], np.uint16)
    assert to_uint8(image, (1000, 3000)).tolist() == [0, 0, 128, 255, 255]


@given(arrays(np.uint16, array_shapes(min_dims=2, max_dims=2)))
def test_a_window_of_the_stack_keeps_the_order_of_intensities(image: np.ndarray) -> None:  # type: ignore[type-arg]
    low, high = window_of([image])
    assert low < high
    assert image.min() <= low <= image.max()
    flat = np.sort(image.ravel())
    assert (np.diff(to_uint8(flat, (low, high)).astype(int)) >= 0).all()


@given(st.integers(2, 65535), st.integers(0, 2**32 - 1))
def test_window_of_equals_numpys_percentiles(top: int, seed: int) -> None:
    pages = np.random.default_rng(seed).integers(0, top, (3, 20, 20)).astype(np.uint16)
    low, high = window_of(pages, 10, 90)
    assert low == np.percentile(pages, 10, method="inverted_cdf") or abs(low - np.percentile(pages, 10)) <= top / 20
    assert abs(high - np.percentile(pages, 90)) <= max(1, top / 20)


def test_what_cannot_be_windowed() -> None:
    with pytest.raises(IntensityError, match="need a window"):
        to_uint8(np.zeros(1, np.uint16))
    with pytest.raises(IntensityError, match="is empty"):
        to_uint8(np.zeros(1, np.uint16), (5, 5))
    with pytest.raises(IntensityError, match="without pixels"):
        window_of([])
