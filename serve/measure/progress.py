"""Signs of life of a measurement that takes minutes: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Iterator

_EVERY_S = 10.0


class Progress:
    """Steps done out of a total. It writes to standard error, so that results can be piped.

    On a terminal it is a bar. Elsewhere it is a line at least every ten seconds, also while one step takes longer.

    Args:
        total: steps.
        each: say a line as each step starts and as it ends.
        every_s: longest silence off a terminal, in seconds.
    """

    def __init__(self, total: int, *, each: bool = False, every_s: float = _EVERY_S) -> None:
        self._bar = tqdm(total=total, unit="step", disable=None)
        self._total, self._each, self._every_s = total, each, every_s
        self._done, self._name = 0, "starting"
        self._started = self._said_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_talking, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.close()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step, counted when it ends."""
        self._name, self._started = name, time.monotonic()
        self._bar.set_postfix_str(name)
        if self._each or self._silent_for() >= self._every_s:
            self._say("starts")
        try:
            yield
        finally:
            if self._each:
                self._say(f"done in {time.monotonic() - self._started:.1f} s")
            self._done += 1
            self._bar.update()

    def note(self, text: str) -> None:
        """Say something beside the bar."""
        self._said_at = time.monotonic()
        tqdm.write(text, file=sys.stderr)

    def _say(self, what: str) -> None:
        self.note(f"[{min(self._done + 1, self._total)}/{self._total}] {self._name}: {what}")

    def _silent_for(self) -> float:
        return time.monotonic() - self._said_at

    def _keep_talking(self) -> None:
        while not self._stop.wait(max(0.05, self._every_s - self._silent_for())):
            if not self._bar.disable:
                self._bar.refresh()
                self._said_at = time.monotonic()
            elif self._silent_for() >= self._every_s:
                self._say(f"{time.monotonic() - self._started:.0f} s so far")
