from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from unet.errors import UnetError, command, say


def failing(error: BaseException) -> int:
    @command
    def main(argv: Sequence[str] | None = None) -> int:
        raise error

    return main([])


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UnetError("a.tif is no image"), 2, "error: a.tif is no image\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.tif"),
            2,
            "error: cannot use a.tif: Permission denied\n",
        ),
    ],
)
def test_faults_are_one_sentence(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert failing(error) == code
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())
    with pytest.raises(OSError, match="odd"):
        failing(OSError("odd"))


def test_a_full_disk_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel's own full device."""

    @command
    def main(argv: Sequence[str] | None = None) -> int:
        with Path("/dev/full").open("w") as stream:
            stream.write("x")
        return 0

    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full while writing")


def test_sigterm_runs_the_cleaning_up(tmp_path: Path) -> None:
    code = (
        "import signal, sys\nfrom unet.errors import command, say\n@command\ndef main(argv=None):\n"
        "    try:\n        say('here')\n        signal.pause()\n    finally:\n        say('cleaned')\nsys.exit(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        os.kill(process.pid, signal.SIGTERM)
        assert process.stdout.read() == "cleaned\n"
    assert process.returncode == 143


def test_a_reader_that_went_away_is_no_fault() -> None:
    code = (
        "import sys\nfrom unet.errors import command, say\n@command\ndef main(argv=None):\n"
        "    while True:\n        say('y')\nsys.exit(main())"
    )
    line = f'{sys.executable} -c "$CODE" | head -n 2; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line], env={**os.environ, "CODE": code}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "y\ny\n", "")


def test_say_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a")
    assert capsys.readouterr().out == "a\n"
