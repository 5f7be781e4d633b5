"""The intensities at two percentiles of a stack of any pixel format, without what is no tissue: fill and saturation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError

# The intensities that become 0 and 255.
Window = tuple[float, float]

DTYPES = ("uint8", "uint16", "int8", "int16", "uint32", "int32", "float32", "float64")
LOW_PERCENTILE, HIGH_PERCENTILE = 0.1, 99.9
# Nearly all pixels: those between these two percentiles.
_BULK = (1.0, 99.0)
_BLOCK_PX = 2**22
# With fewer values than this there are no fill values to tell from the others.
_LEAST_VALUES = 32
# Values are counted apart up to so many, in so many blocks of more than 16 bits.
_MOST_VALUES, _BLOCKS_OF_VALUES = 4096, 8
# A plateau has more than so many times the pixels of the mean value.
_PLATEAU = 2


@dataclass(frozen=True)
class Measured:
    """A window and what it was made of.

    Attributes:
        window: the intensities at the 0.1 and 99.9 percentiles, without what was left out.
        bulk: intensities between which nearly all pixels lie.
        left_out: how many pixels have each value that was left out.
        not_finite: pixels that are no finite number.
        pixels: in all.
    """

    window: Window
    bulk: Window
    left_out: dict[float, int]
    not_finite: int
    pixels: int


class _Counts:
    """Pixels counted by the upper 16 bits of keys that rise with the intensity; with 16 bits that is every value."""

    def __init__(self) -> None:
        self.dtype: np.dtype[Any] | None = None
        self.upper = np.zeros(2**16, np.int64)
        self.not_finite = 0
        self.ends: dict[int, int] = {}  # pixels of the smallest and largest key that came, and of the type's own
        self.smallest, self.largest = 2**32, -1
        self.values: set[int] = set()  # keys, until there are many
        self._blocks = 0

    def add(self, keys: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        if keys.size == 0:
            return
        wide = keys.dtype == np.uint32
        self.upper += np.bincount(keys >> 16 if wide else keys, minlength=self.upper.size)
        if not wide:
            return
        if self._blocks < _BLOCKS_OF_VALUES and len(self.values) < _MOST_VALUES:
            self.values.update(np.unique(keys)[:_MOST_VALUES].tolist())
        self._blocks += 1
        smallest, largest = (min(self.smallest, int(keys.min())), max(self.largest, int(keys.max())))
        self.smallest, self.largest = smallest, largest
        wanted = {smallest, largest} | _limits(dtype)
        self.ends = {key: self.ends.get(key, 0) + int(np.count_nonzero(keys == key)) for key in wanted}

    @property
    def pixels(self) -> int:
        """Finite ones."""
        return int(self.upper.sum())

    def finish(self) -> None:
        """Know the ends and the values of 16-bit keys too."""
        if self.dtype is None or self.dtype.itemsize > 2 or self.pixels == 0:
            return
        present = np.flatnonzero(self.upper)
        self.values = set(present[:_MOST_VALUES].tolist())
        wanted = {int(present[0]), int(present[-1])} | _limits(self.dtype)
        self.ends = {key: int(self.upper[key]) for key in wanted}


def measure(stack: Iterable[npt.NDArray[Any]]) -> Measured:
    """The intensities at the 0.1 and 99.9 percentiles of a stack, without its fill values and saturated pixels.

    Left out are not-a-number, the infinities, an integer type's smallest and largest value, and the stack's smallest
    and largest where that is a plateau: more than 0.1 % of the pixels, and more than twice those of the mean value.

    Args:
        stack: blocks of pixels, all of one of `DTYPES`; with more than 16 bits they are taken twice.

    Raises:
        UnetError: if the stack has no pixels, or others.
    """
    counts = _Counts()
    total = 0
    for keys, dtype, size in _keys(stack):
        counts.add(keys, dtype)
        total += size
    counts.finish()
    if total == 0:
        raise UnetError("a stack without pixels has no intensity window")
    counts.not_finite = total - counts.pixels
    if counts.dtype is None or counts.pixels == 0:
        return Measured((0.0, 1.0), (0.0, 1.0), {}, counts.not_finite, total)
    left_out = _left_out(counts)
    shares = (LOW_PERCENTILE, *_BULK, HIGH_PERCENTILE)
    keys_at = _percentiles(stack, counts, left_out, shares)
    if keys_at[0] == keys_at[-1] and left_out:
        left_out = {}
        keys_at = _percentiles(stack, counts, left_out, shares)
    low, bulk_low, bulk_high, high = (_value(key, counts.dtype) for key in keys_at)
    if not low < high:
        # A flat stack has one intensity; a window of one step keeps it.
        high = low + 1 if low + 1 > low else float(np.nextafter(np.float32(low), np.float32(np.inf)))
        bulk_low, bulk_high = low, high
    named = {_value(key, counts.dtype): count for key, count in left_out.items()}
    return Measured((low, high), (bulk_low, bulk_high), named, counts.not_finite, total)


def _left_out(counts: _Counts) -> dict[int, int]:
    """The keys that are fill values or saturation, with their pixels."""
    assert counts.dtype is not None
    if len(counts.values) < _LEAST_VALUES:
        return {}
    present = sorted(key for key, count in counts.ends.items() if count)
    limits = _limits(counts.dtype)
    rest = counts.pixels
    found = {key: counts.ends[key] for key in present if key in limits}
    rest -= sum(found.values())
    least = max(rest * LOW_PERCENTILE / 100, _PLATEAU * rest / len(counts.values))
    for key in (present[0], present[-1]):
        if key not in found and counts.ends[key] > least:
            found[key] = counts.ends[key]
    return found


def _limits(dtype: np.dtype[Any]) -> set[int]:
    """The keys of an integer type's smallest and largest value."""
    return {0, 2 ** (8 * dtype.itemsize) - 1} if dtype.kind in "ui" else set()


def _percentiles(
    stack: Iterable[npt.NDArray[Any]], counts: _Counts, left_out: dict[int, int], shares: Sequence[float]
) -> list[int]:
    """The keys at percentiles, in rising order."""
    assert counts.dtype is not None
    wide = counts.dtype.itemsize > 2
    upper = counts.upper.copy()
    for key, count in left_out.items():
        upper[key >> 16 if wide else key] -= count
    below = np.cumsum(upper)
    # Ranks from 1 on: below the median the next pixel after the share, above it the pixel that completes it.
    total = int(below[-1])
    ranks = [
        min(total, int(total * share / 100) + 1) if share < 50 else max(1, int(np.ceil(total * share / 100)))
        for share in shares
    ]
    bins = [int(np.searchsorted(below, rank)) for rank in ranks]
    if not wide:
        return bins
    lower = {chosen: np.zeros(2**16, np.int64) for chosen in bins}
    for keys, _, _ in _keys(stack):
        high = keys >> 16
        for chosen, histogram in lower.items():
            histogram += np.bincount(keys[high == chosen] & 0xFFFF, minlength=histogram.size)
    for key, count in left_out.items():
        if key >> 16 in lower:
            lower[key >> 16][key & 0xFFFF] -= count
    return [
        (chosen << 16) + int(np.searchsorted(np.cumsum(lower[chosen]), rank - int(below[chosen] - upper[chosen])))
        for rank, chosen in zip(ranks, bins)
    ]


def _keys(stack: Iterable[npt.NDArray[Any]]) -> Iterator[tuple[npt.NDArray[Any], np.dtype[Any], int]]:
    """The finite pixels of blocks as unsigned keys that rise with the intensity; with each, how many pixels it was of.

    Keys of 8 and 16 bits are uint16, others uint32; float64 is rounded to float32.
    """
    for image in stack:
        check_dtype(image.dtype)
        flat = image.ravel()
        # Counting works on 8-byte copies: block by block a large slice does not take eight times its size.
        for first in range(0, flat.size, _BLOCK_PX):
            part = flat[first : first + _BLOCK_PX]
            yield _keys_of(part), image.dtype, part.size


def _keys_of(part: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kind, size = part.dtype.kind, part.dtype.itemsize
    if kind == "u":
        return part
    if kind == "i":
        unsigned = np.dtype(f"u{size}")
        return np.asarray(part.view(unsigned) ^ np.asarray(1 << (8 * size - 1), unsigned))
    with np.errstate(over="ignore"):
        values = part.astype(np.float32) + np.float32(0)  # one zero only
    bits = values[np.isfinite(values)].view(np.uint32)
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _value(key: int, dtype: np.dtype[Any]) -> float:
    """The intensity of a key."""
    if dtype.kind == "u":
        return float(key)
    if dtype.kind == "i":
        return float(key - (1 << (8 * dtype.itemsize - 1)))
    bits = key & 0x7FFFFFFF if key >> 31 else ~key & 0xFFFFFFFF
    return float(np.uint32(bits).view(np.float32))


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Refuse pixels that have no window.

    Raises:
        UnetError: saying so.
    """
    if dtype.name not in DTYPES:
        raise UnetError(f"{dtype} intensities cannot be read: convert the stack to 8- or 16-bit grey")
