"""Nobody waits for 10 seconds without a sign of life, and nothing of what a command says is lost."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import progress
from tools.progress import Progress, follow, in_words

WRITER = """
import json, sys
with open(sys.argv[1], "a") as log:
    for step in range(50):
        line = "DLLL " + json.dumps({"step": step}) + "\\n"
        for part in (line[:9], line[9:]):
            log.write(part)
            log.flush()
    log.write("the end, without a newline")
"""


def test_a_file_is_followed_until_its_writer_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)]) as writer:
        lines = [line for line in follow(writer, path) if line is not None]
    assert [json.loads(line[5:])["step"] for line in lines[:-1]] == list(range(50))
    assert lines[-1] == "the end, without a newline"


def test_a_silent_command_shows_a_sign_of_life(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.5)
    code = progress.run(
        [sys.executable, "-c", "import time; time.sleep(1.8)"], "building", tmp_path / "log", expected_s=120
    )
    said = capsys.readouterr().out.splitlines()
    assert code == 0
    assert said[0].startswith("   building: 1 s so far, about 1 min 59 s left")
    assert said[-1] == "   building: done in 2 s"


def test_a_line_comes_at_least_every_ten_seconds() -> None:
    assert progress.LINE_EVERY_S + progress.DRAW_EVERY_S < 10


def test_a_failure_shows_what_the_command_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log"
    code = "import sys; print('no such file'); sys.exit(3)"
    assert progress.main(["--title", "building", "--log", str(log), "--", sys.executable, "-c", code]) == 3
    said = capsys.readouterr()
    assert "no such file" in said.out
    assert said.err == f"error: building failed (exit code 3); everything that it said is in {log}\n"


def test_a_terminal_gets_a_bar_and_a_clean_line_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DRAW_EVERY_S", 0.0)
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream:
        shown = Progress("train", stream=stream)
        shown.pulse(0.5, note="step 800")
        shown.line("step 800: held-out Dice 0.8")
        said = ""
        while not said.endswith("0.8\r\n"):
            said += os.read(controller, 4096).decode()
    os.close(controller)
    bar = "#" * 12 + "." * 12
    assert f"\r\x1b[Ktrain [{bar}] step 800, " in said
    assert said.endswith("\r\x1b[Kstep 800: held-out Dice 0.8\r\n")


def test_the_time_left_that_is_known_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    shown = Progress("train", expected_s=1000, stream=stream)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 30)
    shown.pulse(0.25, 95, "step 400")
    assert stream.getvalue() == "   train: step 400, 30 s so far, about 1 min 35 s left\n"


def test_what_takes_longer_than_usual_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    shown = Progress("export", expected_s=20, stream=stream)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 30)
    shown.pulse()
    assert stream.getvalue() == "   export: 30 s so far, longer than the usual 20 s\n"


def test_durations_in_words() -> None:
    assert [in_words(seconds) for seconds in (0.4, 59.4, 59.6, 200)] == ["0 s", "59 s", "1 min 0 s", "3 min 20 s"]


def test_it_runs_on_a_bare_python(tmp_path: Path, project_root: Path) -> None:
    line = [
        "tools/progress.py",
        "--title",
        "copying",
        "--log",
        str(tmp_path / "log"),
        "--",
        sys.executable,
        "--version",
    ]
    bare = [sys.executable, "-S", "-I", *line]
    done = subprocess.run(bare, cwd=project_root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "   copying: done in 0 s\n"
