"""Signs of life of a measurement that takes minutes: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from unet.progress import EVERY_S
from unet.progress import Progress as Parts

if TYPE_CHECKING:
    from collections.abc import Iterator


class Progress(Parts):
    """Named steps done out of a total. It writes to standard error, so that results can be piped.

    Args:
        total: steps.
        each: say a line as each step starts and as it ends.
        every_s: longest silence off a terminal, in seconds.
    """

    def __init__(self, total: int, *, each: bool = False, every_s: float = EVERY_S) -> None:
        super().__init__(total, "", lambda text: tqdm.write(text, file=sys.stderr), unit="step", every_s=every_s)
        self._steps, self._each, self._name, self._started = total, each, "starting", time.monotonic()

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step, counted when it ends."""
        self._name, self._started = name, time.monotonic()
        self._bar.set_postfix_str(name)
        if self._each or self.silent_for >= self._every_s:
            self.say(self._about("starts"))
        try:
            yield
        finally:
            if self._each:
                self.say(self._about(f"done in {time.monotonic() - self._started:.1f} s"))
            self.advance()

    def line(self) -> str:
        """Which step it is, and for how long already."""
        return self._about(f"{time.monotonic() - self._started:.0f} s so far")

    def _about(self, what: str) -> str:
        return f"[{min(self._done + 1, self._steps)}/{self._steps}] {self._name}: {what}"
