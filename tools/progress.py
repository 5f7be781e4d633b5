"""A sign of life from a command that says nothing for minutes: ``python tools/progress.py --title T -- COMMAND``.

It needs nothing but Python itself: it also runs before anything is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

# Without a terminal a line comes at least so often; on one the bar is drawn anew more often.
LINE_EVERY_S = 8.0
DRAW_EVERY_S = 0.5
BAR_CELLS = 24


class Process(Protocol):
    """What is watched, as `subprocess.Popen` has it."""

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""


class Progress:
    """Shows how far one step of a longer job is: a bar on a terminal, lines elsewhere.

    Args:
        title: name of the step.
        expected_s: seconds that it takes; None if nothing is known.
        stream: where it is shown.
    """

    def __init__(self, title: str, expected_s: float | None = None, stream: TextIO | None = None) -> None:
        self._title = title
        self._expected_s = expected_s
        self._stream = sys.stdout if stream is None else stream
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self._started

    def line(self, text: str) -> None:
        """Show a line of the step's own output."""
        self.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()
        self._shown = time.monotonic()

    def pulse(self, share: float | None = None, left_s: float | None = None, note: str = "") -> None:
        """Show a sign of life if the last one is some time ago.

        Args:
            share: how much is done, 0 to 1; by default the elapsed share of the expected time.
            left_s: seconds until the end; by default what is left of the expected time.
            note: what else there is to say.
        """
        if time.monotonic() - self._shown < (DRAW_EVERY_S if self._terminal else LINE_EVERY_S):
            return
        if not self._terminal:
            self.line(f"   {self._title}: {self._text(left_s, note)}")
            return
        done = self._share(share)
        filled = round(done * BAR_CELLS) if done is not None else 0
        text = f"{self._title} [{'#' * filled}{'.' * (BAR_CELLS - filled)}] {self._text(left_s, note)}"
        self._stream.write(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}")
        self._stream.flush()
        self._shown = time.monotonic()

    def clear(self) -> None:
        """Take the bar off the terminal."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def _share(self, share: float | None) -> float | None:
        if share is None and self._expected_s:
            share = self.elapsed_s / self._expected_s
        return None if share is None else min(1.0, share)

    def _text(self, left_s: float | None, note: str) -> str:
        parts = [note, f"{in_words(self.elapsed_s)} so far"]
        expected_s = self._expected_s
        if left_s is None and expected_s is not None:
            left_s = expected_s - self.elapsed_s
            ending = f"longer than the usual {in_words(expected_s)}"
        else:
            ending = "nearly done"
        if left_s is not None:
            parts.append(f"about {in_words(left_s)} left" if left_s > 1 else ending)
        return ", ".join(filter(None, parts))


def in_words(seconds: float) -> str:
    """A duration: "48 s", "3 min 20 s"."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


def follow(process: Process, path: Path) -> Iterator[str | None]:
    """The lines of a file as they are written, and None twice a second, until ``process`` has ended.

    Args:
        process: it writes the file.
        path: the file; it need not exist yet.
    """
    ended, partial, position = False, b"", 0
    while not ended:
        # The wait is the clock: it returns at once when the process ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DRAW_EVERY_S)
            ended = True
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(position)
                new = stream.read()
            position += len(new)
            *lines, partial = (partial + new).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
        yield None
    if partial:
        yield partial.decode(errors="replace")


def run(words: Sequence[str], title: str, log: Path, expected_s: float | None = None, **options: Any) -> int:
    """Run a command whose output goes to ``log``, with a sign of life on the screen; its exit code.

    The end of the log is shown if it fails.
    """
    progress = Progress(title, expected_s)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, **options)
    try:
        for _ in follow(process, log):
            progress.pulse()
    finally:
        process.terminate()
        code = process.wait()
    if code:
        progress.line(log.read_text(encoding="utf-8", errors="replace")[-3000:])
    else:
        progress.line(f"   {title}: done in {in_words(progress.elapsed_s)}")
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(prog="tools/progress.py", description=__doc__)
    parser.add_argument("--title", required=True, help="what the command does")
    parser.add_argument("--expected_s", type=float, help="seconds that it usually takes")
    parser.add_argument("--log", type=Path, required=True, help="file that takes what it says")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    chosen = parser.parse_args(argv)
    code = run(chosen.command[chosen.command[:1] == ["--"] :], chosen.title, chosen.log, chosen.expected_s)
    if code:
        sys.stderr.write(
            f"error: {chosen.title} failed (exit code {code}); everything that it said is in {chosen.log}\n"
        )
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
