from __future__ import annotations

import errno
import os
import pty
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from unet.errors import UnetError, command, say
from unet.files import naming

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "error: cannot use a file: Input/output error\n"),
        (OSError(errno.EIO, "Input/output error", "from", None, "to"), "error: cannot use to: Input/output error\n"),
    ],
)
def test_a_broken_disk_is_a_sentence(error: OSError, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert failing(error) == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("file", [None, "/out/.card.json.1a2b.aside/card.json"])
def test_an_error_while_a_file_is_written_names_it(file: str | None) -> None:
    with pytest.raises(OSError) as caught, naming("/out/card.json"):
        raise OSError(errno.EIO, "Input/output error", *([] if file is None else [file]))
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "/out/card.json")


def test_an_error_that_names_another_file_keeps_its_name() -> None:
    with pytest.raises(FileNotFoundError, match=r"/in/model\.onnx"), naming("/out/card.json"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/in/model.onnx")


def test_numpys_own_error_of_a_write_gets_a_number_and_the_files_name() -> None:
    """On a device that is always full, numpy writes nothing and says neither."""
    with (
        Path("/dev/full").open("wb", buffering=0) as full,
        pytest.raises(OSError, match="0 of 5000 values") as caught,
        naming("/out/mask.tif"),
    ):
        np.zeros(5000).tofile(full)
    assert (caught.value.errno, caught.value.filename) == (errno.EIO, "/out/mask.tif")


def test_standard_output_on_a_full_disk_is_one_sentence() -> None:
    code = "import sys\nfrom unet.errors import command, say\nsys.exit(command(lambda argv: say('result') or 0)([]))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: the disk is full while writing: free some space and run the command again"
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_stop_runs_the_cleaning_up(number: signal.Signals) -> None:
    code = (
        "import signal, sys\nfrom unet.errors import command, say\n@command\ndef main(argv=None):\n"
        "    try:\n        say('here')\n        signal.pause()\n    finally:\n        say('cleaned')\nsys.exit(main())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        os.kill(process.pid, number)
        assert process.stdout.read() == "cleaned\n"
    assert process.returncode == 128 + number


CLOSED = """
import signal, sys
from pathlib import Path
from unet.errors import command, say
from unet.processes import signals_held_back

@command
def main(argv=None):
    try:
        with signals_held_back():
            say("here")
            signal.sigtimedwait([signal.SIGUSR1], 60)
        say("after the signal")
        Path(sys.argv[1]).write_text("finished")
    finally:
        say("cleaned")
        Path(sys.argv[2]).touch()

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
sys.exit(main())
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_a_closed_terminal_ends_a_command_in_order_unless_nohup_started_it(nohup: bool, tmp_path: Path) -> None:
    finished, cleaned = tmp_path / "finished", tmp_path / "cleaned"
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        words = [*(["nohup"] if nohup else []), sys.executable, "-c", CLOSED, str(finished), str(cleaned)]
        os.execvp(words[0], words)
    said, output = b"", tmp_path / "nohup.out"
    while b"here" not in said:
        said = output.read_bytes() if nohup and output.exists() else said + os.read(terminal, 1000)
    os.close(terminal)  # the system sends SIGHUP, and what is written from now on is an error
    os.kill(pid, signal.SIGUSR1)
    status = os.waitpid(pid, 0)[1]
    assert cleaned.exists()
    assert finished.exists() == nohup
    assert os.waitstatus_to_exitcode(status) == (0 if nohup else 128 + signal.SIGHUP)


WORK = """
import logging, sys
from pathlib import Path
from tqdm import tqdm
from unet.errors import UnetError, command, say

@command
def main(argv=None):
    for step in tqdm(range(1000), file=sys.stderr, mininterval=0, leave=False):
        say(f"step {step} " + 100 * ".")
        logging.warning("step %d", step)
    Path(sys.argv[1]).write_text("saved")
    if len(sys.argv) > 2:
        raise UnetError(f"{sys.argv[2]} does not exist")
    return 0

sys.exit(main())
"""


def run_piped(shell: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run WORK in a shell line where ``$RUN`` stands for it; the exit code is the command's own."""
    line = f"RUN() {{ {shlex.join([sys.executable, '-c', WORK, *words])}; }}; {shell}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "shell", ["RUN 2>/dev/null | head -n 2", "RUN 2>&1 >/dev/null | head -n 2", "RUN 2>&1 | head -c 0", "RUN >&- 2>&-"]
)
def test_work_goes_on_when_nobody_reads(shell: str, tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    done = run_piped(shell, str(saved))
    assert (done.returncode, done.stderr) == (0, "")
    assert saved.read_text() == "saved"


@pytest.mark.parametrize("shell", ["RUN 2>/dev/null | head -n 2", "RUN 2>&1 | head -c 0", "RUN >&- 2>&-"])
def test_a_fault_is_one_whether_or_not_somebody_reads(shell: str, tmp_path: Path) -> None:
    assert run_piped(shell, str(tmp_path / "checkpoint"), "missing.tif").returncode == 2


def test_a_closed_output_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint"
    code = (
        "import os, sys\nfrom unet.errors import command, say\n@command\ndef main(argv=None):\n"
        "    with open(sys.argv[1], 'w') as file:\n        say('hello')\n        os.write(1, b'from a library')\n"
        "        os.write(2, b'from a library')\n        file.write('saved')\n    return 0\nsys.exit(main())"
    )
    line = f"{shlex.join([sys.executable, '-c', code, str(saved)])} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", line], check=False).returncode == 0
    assert saved.read_text() == "saved"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_no_message_fails_for_its_letters(encoding: str) -> None:
    """A name with an umlaut, one in another script, and one that is not text at all."""
    text = os.fsdecode("Präparat.tif 切片.tif ".encode() + b"\xff.tif")
    code = (
        "import os, sys\nfrom unet.errors import UnetError, command, say\n@command\ndef main(argv=None):\n"
        "    text = os.fsdecode(bytes.fromhex(sys.argv[1]))\n    say(text)\n    raise UnetError(text)\n"
        "sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, os.fsencode(text).hex()],
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    shown = text.encode(encoding, "backslashreplace")
    assert (done.returncode, done.stdout, done.stderr) == (2, shown + b"\n", b"error: " + shown + b"\n")


def test_say_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("a")
    assert capsys.readouterr().out == "a\n"
