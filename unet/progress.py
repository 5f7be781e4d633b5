"""Signs of life of work of many like parts: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import TYPE_CHECKING, Self, TypeVar

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

_Item = TypeVar("_Item")
EVERY_S = 10.0


class Progress:
    """Parts done, from the ``with`` on.

    Off a terminal (of standard error) there is a line at least every ten seconds, also while one part takes longer.

    Args:
        total: parts; None where nobody knows how many there will be.
        what: is done with them, as in "3 of 7 slices of a.tif segmented"; without a total as in "reading a.tif".
        tell: takes a line.
        unit: the name of one part, for the bar.
        name: of the bar; by default what is done.
        quiet: neither bar nor lines.
        passing: the bar comes after a second and goes with the last part, for work within other work.
        every_s: longest silence off a terminal, in seconds.
    """

    def __init__(
        self,
        total: int | None,
        what: str,
        tell: Callable[[str], None],
        *,
        unit: str = "slice",
        name: str | None = None,
        quiet: bool = False,
        passing: bool = False,
        every_s: float = EVERY_S,
    ) -> None:
        shown = True if quiet else None
        self._bar = tqdm(
            total=total, desc=name or what, unit=unit, disable=shown, leave=not passing, delay=float(passing)
        )
        # A bar that is not shown keeps nothing.
        self._total, self._what, self._unit = total, what, unit
        self._quiet, self._tell, self._every_s = quiet, tell, every_s
        self._done = self._before = 0
        self._began = self._said_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_talking, daemon=True)

    def __enter__(self) -> Self:
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if not self._quiet:
            self._thread.join()
        self._bar.close()

    def over(self, items: Iterable[_Item]) -> Iterator[_Item]:
        """The items, one after another; each is done when the next one is asked for."""
        with self:
            for item in items:
                yield item
                self.advance()

    def advance(self, parts: int = 1) -> None:
        """So many more parts are done."""
        self._done += parts
        self._bar.update(parts)

    def from_here(self) -> None:
        """What is done so far was found before: the rate and the time left are of what follows."""
        self._bar.initial = self._done
        self._bar.unpause()
        self._began, self._before = time.monotonic(), self._done

    def line(self) -> str:
        """How far the work is, in words."""
        spent, done = time.monotonic() - self._began, self._done - self._before
        if self._total is None:
            parts = f"{self._done} {self._unit}s, " if self._done else ""
            return f"{self._what}: {parts}{_duration(spent)} so far"
        left = self._total - self._done
        time_left = f", about {_duration(spent * left / done)} left" if done and left else ""
        return f"{self._done} of {self._total} {self._what}{time_left}"

    def say(self, text: str) -> None:
        """Say a line now, if not quiet; the next one comes after a whole silence."""
        self._said_at = time.monotonic()
        if self._quiet:
            return
        # Work goes on where nobody can be told of it.
        with contextlib.suppress(OSError):
            self._tell(text)

    @property
    def silent_for(self) -> float:
        """Seconds since the last line."""
        return time.monotonic() - self._said_at

    def _keep_talking(self) -> None:
        while not self._stop.wait(max(0.05, self._every_s - self.silent_for)):
            if not self._bar.disable:
                self._bar.refresh()
                self._said_at = time.monotonic()
            elif self.silent_for >= self._every_s:
                self.say(self.line())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
