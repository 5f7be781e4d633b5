"""Ctrl-C during the demo, wherever it comes, leaves no process and no shared memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest


def processes_of(checkout: Path) -> list[psutil.Process]:
    """The processes that run in the checkout."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if Path(process.cwd()).is_relative_to(checkout):
                found.append(process)
    return found


@contextlib.contextmanager
def shared_memory_of(checkout: Path) -> Iterator[set[str]]:
    """The segments that the checkout's processes map while the block runs; others' on the machine do not count."""
    seen: set[str] = set()
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.05):
            for process in processes_of(checkout):
                with contextlib.suppress(psutil.Error, OSError):
                    seen.update(one.path for one in process.memory_maps() if one.path.startswith("/dev/shm/"))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("   step 10: validation Dice", marks=pytest.mark.slow),
        "[0]<stdout>:training on",
        pytest.param("== start Triton", marks=pytest.mark.slow),
        pytest.param("== benchmark", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_nothing(checkout: Path, user_environment: dict[str, str], moment: str) -> None:
    line = ["make", "demo", "DEMO_FLAGS=--quick"]
    with (
        shared_memory_of(checkout) as segments,
        subprocess.Popen(
            line, cwd=checkout, env=user_environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        ) as make,
    ):
        assert make.stdout is not None
        for text in make.stdout:
            if text.startswith(moment):
                # As a terminal does it: to the whole foreground process group.
                os.killpg(make.pid, signal.SIGINT)
                break
        else:
            pytest.fail(f"the demo never said {moment!r}")
        make.stdout.read()
    assert make.returncode != 0
    assert [process.cmdline() for process in processes_of(checkout)] == []
    assert [path for path in segments if Path(path).exists()] == []
