from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unet.errors import UnetError
from unet.intensity import parse_window, to_uint8
from unet.intensity.percentiles import measure

Array = npt.NDArray[Any]
windows = st.tuples(st.integers(0, 65534), st.integers(1, 65535)).filter(lambda w: w[0] < w[1])


@given(arrays(np.uint16, (4, 5)), windows)
def test_a_window_maps_linearly_and_clips(image: Array, window: tuple[int, int]) -> None:
    low, high = window
    result = to_uint8(image, window)
    exact = np.clip((image.astype(np.float64) - low) * 255 / (high - low), 0, 255)
    assert result.dtype == np.uint8
    assert (np.abs(result - exact) <= 0.5 + 1e-3).all()


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: to_uint8(np.zeros(3, np.uint16)), "uint16 intensities need a window"),
        (lambda: to_uint8(np.zeros(3, np.uint8), (4, 4)), "window 4 to 4 is empty"),
        (lambda: to_uint8(np.zeros(3, np.uint8), (0, float("nan"))), "window 0 to nan is empty"),
        (lambda: to_uint8(np.zeros(3, np.float32)), "float32 intensities need a window"),
        (lambda: to_uint8(np.zeros(3, np.uint64), (0, 1)), "uint64 intensities cannot be read"),
        (lambda: measure([np.zeros(3, complex)]), "complex128 intensities cannot be read"),
        (lambda: measure([]), "without pixels"),
        (lambda: parse_window(["slices"]), "--window slices is neither two intensities"),
        (lambda: parse_window(["9", "1"]), "window 9 to 1 is empty"),
    ],
)
def test_what_has_no_8_bits(act: Any, sentence: str) -> None:
    with pytest.raises(UnetError, match=sentence):
        act()


@pytest.mark.parametrize(
    ("dtype", "low"), [("uint32", 2**31), ("int32", -(2**30)), ("float64", 1e9), ("uint16", 60000)]
)
def test_neighbouring_intensities_of_a_narrow_window_stay_apart(dtype: str, low: float) -> None:
    """Values of 32 bits have more digits than float32: 2^31 + 1 would become 2^31."""
    steps = np.arange(256)
    image = (np.asarray(low, np.float64) + steps).astype(dtype)
    np.testing.assert_array_equal(to_uint8(image, (low, low + 255)), steps)


def test_beyond_what_a_number_can_hold_is_an_end_and_no_warning() -> None:
    image = np.array([-np.inf, -3e38, 0, 3e38, np.inf, np.nan], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(to_uint8(image, (-1e-30, 1e-30)), [0, 0, 128, 255, 255, 0])
        np.testing.assert_array_equal(to_uint8(image.astype(np.float64) * 1e100, (-1, 1)), [0, 0, 128, 255, 255, 0])
