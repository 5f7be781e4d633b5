"""Signs of life off a terminal, which these tests are."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from unet.progress import Progress, _duration


class Lines:
    """The lines that were told, and a wait for so many of them."""

    def __init__(self) -> None:
        self.all: list[str] = []
        self._more = threading.Condition()

    def __call__(self, text: str) -> None:
        with self._more:
            self.all.append(text)
            self._more.notify_all()

    def wait_for(self, count: int) -> list[str]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.all) >= count, 30)
        return self.all


def test_a_part_that_takes_long_gives_lines_too() -> None:
    lines = Lines()
    with Progress(3, "slices of a.tif segmented", lines, every_s=0.01) as progress:
        assert set(lines.wait_for(3)) == {"0 of 3 slices of a.tif segmented"}
        progress.advance(2)
        told = lines.wait_for(len(lines.all) + 2)[-1]
        assert re.fullmatch(r"2 of 3 slices of a\.tif segmented, about \d+ s left", told)
        progress.advance()
        assert lines.wait_for(len(lines.all) + 2)[-1] == "3 of 3 slices of a.tif segmented"
    count = len(lines.all)
    with Progress(1, "other", Lines(), every_s=0.01):
        pass
    assert len(lines.all) == count


def test_what_was_found_before_is_not_part_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("unet.progress.time.monotonic", lambda: clock[0])
    progress = Progress(100, "slices segmented", Lines())
    progress.advance(80)
    clock[0] += 1
    progress.from_here()
    assert progress.line() == "80 of 100 slices segmented"
    progress.advance(5)
    clock[0] += 600
    assert progress.line() == "85 of 100 slices segmented, about 30 min left"


def test_work_without_a_total_tells_how_long_it_has_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("unet.progress.time.monotonic", lambda: clock[0])
    progress = Progress(None, "looking through a.tif", Lines())
    clock[0] += 25
    assert progress.line() == "looking through a.tif: 25 s so far"
    progress.advance(7)
    assert progress.line() == "looking through a.tif: 7 slices, 25 s so far"


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (9000, "2.5 h")])
def test_durations(seconds: float, words: str) -> None:
    assert _duration(seconds) == words


def test_items_are_done_one_after_another() -> None:
    progress = Progress(3, "letters read", Lines())
    seen = [(item, progress.line().partition(",")[0]) for item in progress.over("abc")]
    assert seen == [("a", "0 of 3 letters read"), ("b", "1 of 3 letters read"), ("c", "2 of 3 letters read")]
    assert progress.line() == "3 of 3 letters read"


def test_short_or_quiet_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    lines = Lines()
    assert list(Progress(3, "letters read", lines).over("abc")) == ["a", "b", "c"]
    with Progress(3, "letters read", lines, quiet=True, every_s=0.0) as progress:
        progress.advance()
    assert lines.all == []
    assert capsys.readouterr() == ("", "")


def test_work_goes_on_where_nobody_can_be_told(tmp_path: Path) -> None:
    def full(text: str) -> None:
        told.set()
        raise OSError(28, "No space left on device")

    told = threading.Event()
    with Progress(2, "letters read", full, every_s=0.01) as progress:
        assert told.wait(30)
        told.clear()
        assert told.wait(30)
        progress.advance(2)


TERMINAL = """
import sys
from unet.progress import Progress
with Progress(4, "slices read", lambda text: sys.stderr.write("a line"), name="a.tif") as progress:
    progress.advance(4)
with Progress(2, "slices linked", lambda text: sys.stderr.write("a line")) as progress:
    progress.advance(2)
"""


def test_on_a_terminal_it_is_a_bar(project_root: Path) -> None:
    here, there = pty.openpty()
    termios.tcsetwinsize(there, (24, 80))
    with subprocess.Popen([sys.executable, "-c", TERMINAL], cwd=project_root, stderr=there) as process:
        os.close(there)
        shown = b""
        while select.select([here], [], [], 60)[0]:
            try:
                shown += os.read(here, 4096)
            except OSError:  # the other side is closed
                break
        assert process.wait(60) == 0
    os.close(here)
    assert b"a.tif: 100%" in shown
    assert b"4/4" in shown
    assert b"slices linked: 100%" in shown
    assert b"a line" not in shown
