"""How the slices of a volume become 8 bits, and what the network makes of those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError
from unet.intensity.percentiles import Measured, Window, check_dtype, measure

# A window, or whose percentiles make it; None: uint8 stays as it is, another volume has its own.
WindowChoice = Window | str | None

STACK, SLICE = "stack", "slice"
_BLOCK_PX = 2**22
_SAMPLED_SLICES = 8


class Pixels(Protocol):
    """A volume, as far as its intensity window depends on it."""

    path: Path
    pages: int
    height: int
    width: int
    dtype: np.dtype[Any]

    def rows(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page``, [R, width]."""

    def channel_of(self, page: int) -> int:
        """Which channel the slice shows, from 0 on."""


def normalise(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Raw uint8 intensities of any shape to float32 in [-1, 1]: x / 127.5 - 1.

    The division is a multiplication by the float32 nearest to 1 / 127.5, as it is in the exported graph.
    """
    return image.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def to_uint8(image: npt.NDArray[Any], window: Window | None = None) -> npt.NDArray[np.uint8]:
    """Bring intensities to 8 bits.

    Args:
        image: of one of `unet.intensity.DTYPES`, any shape.
        window: the intensities that become 0 and 255; between them the map is linear, beyond them clipped, and what is
            not a number becomes 0. Without one uint8 stays as it is, the same array.

    Raises:
        UnetError: if the image is of another dtype, is not uint8 and comes without a window, or the window is
            empty.
    """
    check_dtype(image.dtype)
    if window is None:
        if image.dtype != np.uint8:
            raise UnetError(f"{image.dtype} intensities need a window, the two values that become 0 and 255")
        return image
    low, high = window
    check_window(window)
    # Beyond 16 bits the difference is what float32 can hold, not the values.
    exact = np.dtype(np.float32 if image.dtype.itemsize <= 2 else np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = ((image.astype(exact) - np.asarray(low, exact)) * np.asarray(255 / (high - low), exact)).astype(
            np.float32
        )
    if image.dtype.kind == "f":
        scaled[np.isnan(scaled)] = 0
    result: npt.NDArray[np.uint8] = np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)
    return result


def check_window(window: Window) -> None:
    """Refuse a window without room between its values.

    Raises:
        UnetError: saying so.
    """
    low, high = window
    if not -np.inf < low < high < np.inf:
        raise UnetError(f"the intensity window {low:g} to {high:g} is empty: its second value must be the larger")


def parse_window(words: Sequence[str] | None) -> WindowChoice:
    """What the words of ``--window`` choose: "stack", "slice", or two intensities.

    Raises:
        UnetError: if they are something else.
    """
    if not words:
        return None
    if len(words) == 1 and words[0] in (STACK, SLICE):
        return words[0]
    try:
        low, high = (float(word) for word in words)
    except ValueError:
        raise UnetError(
            f"--window {' '.join(words)} is neither two intensities, LOW HIGH, nor {STACK} nor {SLICE}"
        ) from None
    check_window((low, high))
    return low, high


@dataclass(frozen=True)
class Windows:
    """How the slices of one volume become 8 bits.

    Attributes:
        each: the window of every slice; None where uint8 stays as it is.
        shared_by: what one window is of: "stack", "channel" or "slice".
        notes: what a user should know of them, a sentence each.
    """

    each: tuple[Window | None, ...]
    shared_by: str = STACK
    notes: tuple[str, ...] = ()

    def apply(self, page: int, image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Slice ``page``, or a part of it, in 8 bits."""
        return to_uint8(image, self.each[page])

    @property
    def value(self) -> Window | tuple[Window | None, ...] | None:
        """For records: None, the one window, or that of every slice."""
        return self.each[0] if len(set(self.each)) == 1 else self.each

    def __str__(self) -> str:
        windows = list(dict.fromkeys(window for window in self.each if window is not None))
        if not windows:
            return "as they are"
        if self.shared_by == SLICE:
            low, high = min(low for low, _ in windows), max(high for _, high in windows)
            return f"{low:.10g} to {high:.10g}, each slice by its own percentiles"
        named = "; ".join(f"{low:.10g} to {high:.10g}" for low, high in windows)
        return named if len(windows) == 1 else f"{named} by channel"


def find_windows(
    volume: Pixels, choice: WindowChoice = None, looked_at: Callable[[], object] = lambda: None
) -> Windows:
    """Decide how a volume's intensities become 8 bits; trainer, exporter and client all ask here.

    By default uint8 stays as it is, and another volume has the window of its own percentiles, each channel for itself.

    Args:
        volume: its pixels are read once, those of more than 16 bits twice; uint8 that stays as it is not at all.
        choice: the window, or "stack" or "slice" for percentiles of the whole stack or of each slice.
        looked_at: called whenever a slice was read.

    Raises:
        UnetError: if the pixels are of a dtype that is not read, or the window is empty.
    """
    check_dtype(volume.dtype)
    if choice is None and volume.dtype == np.uint8:
        return Windows((None,) * volume.pages)
    if choice is not None and not isinstance(choice, str):
        check_window(choice)
        return Windows((choice,) * volume.pages, notes=_notes_on_given(volume, choice, looked_at))
    channels = [volume.channel_of(page) for page in range(volume.pages)]
    groups = list(range(volume.pages)) if choice == SLICE else channels
    members: dict[int, list[int]] = {}
    for page, group in enumerate(groups):
        members.setdefault(group, []).append(page)
    found = {group: measure(_Slices(volume, pages, looked_at)) for group, pages in members.items()}
    shared_by = SLICE if choice == SLICE else "channel" if len(found) > 1 else STACK
    notes = _notes(volume, list(found.values()), shared_by)
    return Windows(tuple(found[group].window for group in groups), shared_by, notes)


class _Slices:
    """Some slices of a volume as blocks of rows, as often as they are asked for."""

    def __init__(self, volume: Pixels, pages: Sequence[int], looked_at: Callable[[], object]) -> None:
        self._volume, self._pages, self._looked_at = volume, pages, looked_at

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        height, step = self._volume.height, max(1, _BLOCK_PX // self._volume.width)
        for page in self._pages:
            for row0 in range(0, height, step):
                yield self._volume.rows(page, row0, min(height, row0 + step))
            self._looked_at()


def _notes(volume: Pixels, found: Sequence[Measured], shared_by: str) -> tuple[str, ...]:
    """What a user should know of a volume's windows."""
    notes = []
    left_out: dict[float, int] = {}
    for one in found:
        for value, count in one.left_out.items():
            left_out[value] = left_out.get(value, 0) + count
    pixels = sum(one.pixels for one in found)
    told = [f"{value:g} ({count / pixels:.1%})" for value, count in left_out.items() if count * 1000 > pixels]
    if told:
        notes.append(f"the intensity window of {volume.path} leaves out pixels of exactly {' and '.join(told)}")
    if missing := sum(one.not_finite for one in found):
        notes.append(_not_finite(volume, missing))
    narrow = [one for one in found if _is_narrow(one.bulk, one.window)]
    if narrow:
        where = "" if len(found) == 1 else f" of {len(narrow)} of {len(found)} {shared_by}s"
        notes.append(_narrow(volume, narrow[0].bulk, narrow[0].window, where))
    return tuple(notes)


def _notes_on_given(volume: Pixels, window: Window, looked_at: Callable[[], object]) -> tuple[str, ...]:
    """The same of a window that was given: floating-point slices are all looked at, of others a few."""
    if volume.dtype.kind == "f":
        pages = list(range(volume.pages))
    else:
        count = min(_SAMPLED_SLICES, volume.pages)
        pages = sorted({index * volume.pages // count for index in range(count)})
    found = measure(_Slices(volume, pages, looked_at))
    notes = [_not_finite(volume, found.not_finite)] if found.not_finite else []
    if _is_narrow(found.bulk, window):
        notes.append(_narrow(volume, found.bulk, window, ""))
    return tuple(notes)


def _is_narrow(bulk: Window, window: Window) -> bool:
    low, high = (min(max(value, window[0]), window[1]) for value in bulk)
    return high - low < (window[1] - window[0]) / 4 and window[1] - window[0] > 1


def _not_finite(volume: Pixels, count: int) -> str:
    return f"{count} pixels of {volume.path} are not finite numbers: they become the ends of the intensity window"


def _narrow(volume: Pixels, bulk: Window, window: Window, where: str) -> str:
    return (
        f"nearly all pixels{where} of {volume.path} lie between {bulk[0]:g} and {bulk[1]:g}, in a quarter of the "
        f"intensity window {window[0]:g} to {window[1]:g}: choose a narrower one with --window LOW HIGH"
    )
