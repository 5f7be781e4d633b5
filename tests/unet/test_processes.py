from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from unet.processes import MemoryWatch, child, end_tree

# A launcher like horovodrun: its worker is in a session of its own, and it does not pass signals on.
LAUNCHER = (
    "import subprocess, sys, time\n"
    "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    "print(worker.pid, flush=True)\n"
    "time.sleep(600)\n"
)


def worker_of(log: Path, process: subprocess.Popen[bytes]) -> psutil.Process:
    while not (text := log.read_text()).endswith("\n"):
        assert process.poll() is None
    return psutil.Process(int(text))


def test_nothing_outlives_the_block(tmp_path: Path) -> None:
    log = tmp_path / "log"
    seen: list[psutil.Process] = []

    def interrupted() -> None:
        with child([sys.executable, "-c", LAUNCHER], log=log) as process:
            seen.extend([psutil.Process(process.pid), worker_of(log, process)])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    launcher, worker = seen
    assert not launcher.is_running()
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells children of a parent's death on Linux alone")
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    """An orphan would go on computing, and write into what the next run of the same command has just swept."""
    log = tmp_path / "log"
    parent = (
        "import sys, time; from pathlib import Path; from unet.processes import child\n"
        f"with child([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)'], "
        f"log=Path({str(log)!r})):\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", parent]) as process:
        while not log.exists():
            assert process.poll() is None
        orphan = worker_of(log, process)
        process.kill()
        psutil.wait_procs([orphan], timeout=60)
    assert not orphan.is_running()


def test_a_program_that_is_not_there_is_said_by_the_parent() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"), child(["no-such-program"]):
        pass


def test_a_stubborn_process_is_killed() -> None:
    code = "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        end_tree(process.pid, grace_s=0.2)
        assert not psutil.pid_exists(process.pid)
    # What is gone already is no fault.
    end_tree(process.pid)


def test_memory_of_descendants_is_seen() -> None:
    code = "import sys; block = bytearray(300 << 20); print('up', flush=True); sys.stdin.read()"
    with MemoryWatch(interval_s=0.01) as memory:
        before = memory.peak
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            while memory.peak < 300 << 20:
                assert process.poll() is None
            process.communicate(b"")
    assert memory.peak > before + (250 << 20)
