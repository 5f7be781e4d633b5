"""The window of a stack against its definition by sorting, where few pixels decide."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from unet.intensity.percentiles import DTYPES, Measured, measure

Array = npt.NDArray[Any]


def limits_of(dtype: np.dtype[Any]) -> set[float]:
    return {float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)} if dtype.kind in "ui" else set()


def by_sorting(pixels: Array) -> Measured:
    """What `measure` says it does, of all pixels at once."""
    values = pixels.ravel().astype(np.float32 if pixels.dtype.kind == "f" else np.int64)
    finite = np.sort(values[np.isfinite(values)])
    if not finite.size:
        return Measured((0.0, 1.0), (0.0, 1.0), {}, values.size, values.size)
    distinct, counts = np.unique(finite, return_counts=True)
    left_out: dict[float, int] = {}
    if len(distinct) >= 32:
        pixels_of = {float(value): int(count) for value, count in zip(distinct, counts)}
        left_out = {value: pixels_of[value] for value in sorted(limits_of(pixels.dtype)) if value in pixels_of}
        rest = finite.size - sum(left_out.values())
        for end in (float(distinct[0]), float(distinct[-1])):
            if end not in left_out and pixels_of[end] > max(rest / 1000, 2 * rest / len(distinct)):
                left_out[end] = pixels_of[end]
    kept = finite[~np.isin(finite, list(left_out))]
    if left_out and at(kept, 0.1) == at(kept, 99.9):
        left_out, kept = {}, finite
    low, bulk_low, bulk_high, high = (at(kept, share) for share in (0.1, 1, 99, 99.9))
    if low == high:
        high = low + 1 if low + 1 > low else float(np.nextafter(np.float32(low), np.float32(np.inf)))
        bulk_low, bulk_high = low, high
    return Measured((low, high), (bulk_low, bulk_high), left_out, values.size - finite.size, values.size)


def at(ordered: Array, share: float) -> float:
    """The pixel that completes a share above the median; below it the next one after the share."""
    exact = len(ordered) * share / 100
    rank = int(exact) if share < 50 else int(np.ceil(exact)) - 1
    return float(ordered[min(max(0, rank), len(ordered) - 1)])


@st.composite
def stacks(draw: st.DrawFn) -> Array:
    """Some values, now and then a plateau at an end or at a type's limit, and in floating point what is no number."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low, high = (-100, 100) if dtype.kind != "u" else (20, 220)
    # Neighbours beyond 16 bits differ in their upper bits, in their lower ones, or in both.
    stride = draw(st.sampled_from([1, 997, 2**16, 2**20 + 1])) if dtype.itemsize > 2 else 1
    pixels = random.choice(np.arange(low, high), draw(st.integers(1, 200)), replace=False)
    pixels = random.choice(pixels, draw(st.integers(1, 4000))) * stride
    for end in (pixels.min(), pixels.max(), *limits_of(dtype)):
        count = draw(st.sampled_from([0, 0, 1, 3, 40, 400]))
        pixels = np.append(pixels, np.full(count, int(end)))
    # Most of a slice may be of one intensity.
    pixels = np.append(pixels, np.full(draw(st.sampled_from([0, 0, 100_000])), pixels[0]))
    pixels = random.permutation(pixels).astype(dtype)
    if dtype.kind == "f":
        pixels[random.random(pixels.size) < draw(st.sampled_from([0, 0.1, 1]))] = np.nan
    return pixels


# A smaller seed is no simpler stack, so nothing is shrunk.
@settings(max_examples=200, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(stacks())
def test_a_window_is_what_its_definition_says(pixels: Array) -> None:
    half = pixels.size // 2
    assert measure([pixels[:half], pixels[half:]]) == by_sorting(pixels)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32"])
def test_one_saturated_pixel_is_left_out(dtype: str) -> None:
    """However few: a limit of the type is no measured intensity. A floating-point type has none."""
    kind = np.iinfo(dtype)
    pixels = np.append(np.arange(4000) % 40 + 30, [kind.min, kind.max, kind.max]).astype(dtype)
    assert measure([pixels]).left_out == {kind.min: 1, kind.max: 2}


def test_where_nearly_all_pixels_are_alike_the_saturated_ones_are_the_other_end() -> None:
    """Without them the window would be empty: 39 pixels of 100,000 are beyond no percentile."""
    pixels = np.full(100_000, 100, np.uint8)
    pixels[:39] = np.arange(39)
    pixels[39:400] = 255
    assert measure([pixels]) == Measured((100, 255), (100, 100), {}, 0, 100_000)


def test_a_flat_stack_beyond_the_precision_of_its_type_has_a_window() -> None:
    low, high = measure([np.full(9, 1e30, np.float32)]).window
    assert low == np.float32(1e30) < high == np.nextafter(np.float32(1e30), np.float32(np.inf))
    assert measure([np.full(9, 2**24 - 1, np.float32)]).window == (2**24 - 1, 2**24)


def test_both_zeros_are_one_value() -> None:
    pixels = np.tile(np.arange(50, dtype=np.float32) + 1, 40)
    pixels[:500], pixels[500:1000] = 0.0, -0.0
    assert measure([pixels]).left_out == {0.0: 1000}


def test_nothing_but_what_is_no_number_has_a_window_all_the_same() -> None:
    pixels = np.array([np.nan, np.inf, -np.inf], np.float32)
    assert measure([pixels]) == Measured((0.0, 1.0), (0.0, 1.0), {}, 3, 3)
