from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from unet.intensity import IntensityError, to_uint8, window_of

Array = npt.NDArray[Any]
windows = st.tuples(st.integers(0, 65534), st.integers(1, 65535)).filter(lambda w: w[0] < w[1])


@given(arrays(np.uint16, (4, 5)), windows)
def test_a_window_maps_linearly_and_clips(image: Array, window: tuple[int, int]) -> None:
    low, high = window
    result = to_uint8(image, window)
    exact = np.clip((image.astype(np.float64) - low) * 255 / (high - low), 0, 255)
    assert result.dtype == np.uint8
    assert (np.abs(result - exact) <= 0.5 + 1e-3).all()


@given(arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))))
def test_the_window_is_that_of_the_whole_stack(stack: Array) -> None:
    low, high = window_of(stack, 0, 100)
    assert low == stack.min()
    assert high == max(stack.max(), stack.min() + 1)


def test_the_window_leaves_the_tails_out() -> None:
    values = np.arange(10_000, dtype=np.uint16)
    pages = np.random.default_rng(0).permutation(values).reshape(4, 50, 50)
    low, high = window_of(iter(pages), 1, 99)
    assert (low, high) == pytest.approx((np.percentile(values, 1), np.percentile(values, 99)), abs=1)
    assert window_of(pages) == pytest.approx((10, 9990), abs=1)


def test_a_flat_stack_keeps_its_intensity() -> None:
    flat = np.full((2, 3, 3), 7, np.uint8)
    assert window_of(flat) == (7, 8)


def test_a_large_slice_takes_little_memory() -> None:
    page = np.zeros((4096, 8192), np.uint8)
    tracemalloc.start()
    window_of([page])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * page.size


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: to_uint8(np.zeros(3, np.uint16)), "uint16 intensities need a window"),
        (lambda: to_uint8(np.zeros(3, np.uint8), (4, 4)), "window 4 to 4 is empty"),
        (lambda: to_uint8(np.zeros(3, np.uint8), (0, float("nan"))), "window 0 to nan is empty"),
        (lambda: to_uint8(np.zeros(3, np.float32), (0, 1)), "float32 intensities cannot be read"),
        (lambda: window_of([np.zeros(3, np.int32)]), "int32 intensities cannot be read"),
        (lambda: window_of([]), "without pixels"),
    ],
)
def test_what_has_no_8_bits(act: Any, sentence: str) -> None:
    with pytest.raises(IntensityError, match=sentence):
        act()
