"""Ctrl-C during the demo, wherever it comes, leaves no process and no shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

SHARED_MEMORY = Path("/dev/shm")


def processes_of(checkout: Path) -> list[str]:
    """The command lines of processes that run in the checkout."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()).is_relative_to(checkout):
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("step 10 of 20", marks=pytest.mark.slow),
        "== start Triton",
        pytest.param("== benchmark", marks=pytest.mark.slow),
    ],
)
def test_ctrl_c_leaves_nothing(checkout: Path, user_environment: dict[str, str], moment: str) -> None:
    before = {path.name for path in SHARED_MEMORY.iterdir()}
    line = ["make", "demo", "DEMO_FLAGS=--quick"]
    with subprocess.Popen(
        line, cwd=checkout, env=user_environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as make:
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
    assert processes_of(checkout) == []
    assert {path.name for path in SHARED_MEMORY.iterdir()} - before == set()
