from __future__ import annotations

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
