"""Child processes that never outlive their parent, and the memory that they took."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

GRACE_S = 30.0
# Has the system send SIGTERM when the parent dies, by PR_SET_PDEATHSIG, and becomes the program. A preexec_fn would be
# no place for it: of a parent with several threads, as TensorFlow's, it may never return.
_TETHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[3:])
"""
_HELD = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@contextlib.contextmanager
def child(
    line: Sequence[str], *, log: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run ``line`` in a session of its own; it and all its descendants are ended with the block.

    In a session of its own it does not get a terminal's Ctrl-C: the parent gets that and ends the child in order. Of a
    parent that was killed the child gets SIGTERM (on Linux); its descendants are then its own to end.

    Args:
        line: program and arguments.
        log: file that takes both output streams; by default they are the parent's.
        environment: the whole environment; by default the parent's.

    Raises:
        FileNotFoundError: there is no such program.
    """
    words = _tethered(line, environment)
    stream = log.open("ab") if log is not None else None
    with contextlib.ExitStack() as stack:
        # A signal in the middle of the start would leave a process that nobody ends.
        with signals_held_back():
            process = subprocess.Popen(words, stdout=stream, stderr=stream, env=environment, start_new_session=True)
            stack.callback(_end, process)
            if stream is not None:
                stream.close()
        yield process


def _tethered(line: Sequence[str], environment: Mapping[str, str] | None) -> list[str]:
    """The same command, ended by the system if this process dies."""
    if sys.platform != "linux":
        return list(line)
    program = shutil.which(line[0], path=environment.get("PATH") if environment is not None else None)
    if program is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), line[0])
    return [sys.executable, "-ISc", _TETHER, str(os.getpid()), program, *line]


def _end(process: subprocess.Popen[bytes]) -> None:
    with signals_held_back():
        end_tree(process.pid)
        process.wait()


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and the SIGHUP of a closed terminal back until the block is done."""
    held: list[int] = []

    def hold(signum: int, frame: FrameType | None) -> None:
        held.append(signum)

    try:
        # What `nohup` has a process ignore stays ignored.
        numbers = [number for number in _HELD if signal.getsignal(number) is not signal.SIG_IGN]
        former = {number: signal.signal(number, hold) for number in numbers}
    except ValueError:  # not the main thread, which alone gets signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if held:
            os.kill(os.getpid(), held[0])


def free_ports(count: int) -> list[int]:
    """Different TCP ports of the loopback interface that nothing listens on."""
    with contextlib.ExitStack() as stack:
        # All are held until the last is found: a port that is closed earlier could be given out again.
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def end_tree(pid: int, grace_s: float = GRACE_S) -> None:
    """End a process and all its descendants: SIGTERM, a bounded wait, SIGKILL for what is left.

    Launchers start their workers in other sessions, so the tree is found by parent and not by process group.
    """
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        root.send_signal(signal.SIGTERM)
    psutil.wait_procs([root], timeout=grace_s)
    for process in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(tree, timeout=grace_s)


@dataclass
class MemoryWatch:
    """The largest resident memory, in bytes, that a process's descendants held at the same time."""

    interval_s: float = 0.5
    peak: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> MemoryWatch:
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(self.interval_s):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += process.memory_info().rss
            self.peak = max(self.peak, total)
