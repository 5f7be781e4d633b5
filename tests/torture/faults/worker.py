"""Runs commands in forked processes under the fault layer: one start of the libraries serves hundreds of runs."""

from __future__ import annotations

import ctypes
import errno
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("layer.c")
ROOT = SOURCE.parents[3]
LIMIT_S = 120.0
_WRITE, _TRUNCATE, _SYNC, _RENAME, _MODE, _MAKE = (1 << bit for bit in range(6))
_ALL = (1 << 6) - 1


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        operations: the calls that it befalls, as bits of the layer.
        number: what they answer; below 0 a signal that the process gets before the call.
        more: whether all later calls fail as well.
        half: whether the first one writes half of what it should instead.
    """

    operations: int
    number: int = 0
    more: bool = False
    half: bool = False


FAULTS = {
    "a disk that fills up": Fault(_WRITE | _TRUNCATE | _MAKE, errno.ENOSPC, more=True, half=True),
    "no space once": Fault(_WRITE | _TRUNCATE | _MAKE | _RENAME, errno.ENOSPC),
    "a broken disk": Fault(_WRITE | _TRUNCATE | _SYNC | _RENAME, errno.EIO),
    "no fsync": Fault(_SYNC, errno.EINVAL),
    "no chmod": Fault(_MODE, errno.EPERM),
    "no rename": Fault(_RENAME, errno.EXDEV),
    "short writes": Fault(_WRITE, half=True),
    "killed": Fault(_ALL, -signal.SIGKILL),
    "killed after half a write": Fault(_WRITE, -signal.SIGKILL, more=True, half=True),
}
# A file system may lack these, and its files are as good as others: a command may go on without them.
FORGIVEN = ("no fsync", "no chmod", "short writes")


@dataclass(frozen=True)
class Ended:
    """How a run ended: exit code, what it said, and how many calls the fault might have befallen."""

    code: int
    out: str
    err: str
    calls: int


def build_layer(folder: Path) -> Path:
    """Compile the layer into a folder."""
    library = folder / "layer.so"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


class Worker:
    """The process that forks."""

    def __init__(self, layer: Path, modules: Sequence[str]) -> None:
        line = [sys.executable, "-m", "tests.torture.faults.worker", str(layer), *modules]
        environment = {
            **os.environ, "LD_PRELOAD": str(layer), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3",
        }  # fmt: skip
        self._process = subprocess.Popen(
            line, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, call: str, argv: Sequence[str], folder: Path, fault: Fault | None = None, at: int = 0) -> Ended:
        """Run one command.

        Args:
            call: "module:function", which takes the arguments and returns an exit code.
            argv: the arguments.
            folder: calls that change files below it are counted.
            fault: what befalls them.
            at: which of them, from 1 on; 0: none.
        """
        job = {"call": call, "argv": list(argv), "folder": str(folder), "at": at, "fault": asdict(fault or Fault(0))}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def _child(layer: Any, job: dict[str, Any], pipes: tuple[int, int]) -> int:
    for descriptor, pipe in zip((1, 2), pipes):
        os.dup2(pipe, descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    module, _, name = job["call"].partition(":")
    main = getattr(importlib.import_module(module), name)
    fault = Fault(**job["fault"])
    layer.fault_arm(job["folder"].encode(), fault.operations, fault.number, fault.more, fault.half, job["at"])
    try:
        code = main(job["argv"]) or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    layer.fault_disarm()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    return int(code)


def _read(pipes: Sequence[int], child: int) -> list[str]:
    """What a child writes to each pipe, until it has closed them all; one that hangs is killed."""
    said, open_pipes, until = {pipe: b"" for pipe in pipes}, list(pipes), time.monotonic() + LIMIT_S
    while open_pipes:
        ready, _, _ = select.select(open_pipes, [], [], max(0.0, until - time.monotonic()))
        if not ready:
            os.kill(child, signal.SIGKILL)
            until += LIMIT_S
        for pipe in ready:
            block = os.read(pipe, 1 << 16)
            said[pipe] += block
            if not block:
                open_pipes.remove(pipe)
    return [text.decode(errors="replace") for text in said.values()]


def work(library: str, modules: Sequence[str]) -> None:
    """Answer jobs until standard input ends."""
    layer = ctypes.CDLL(library)
    layer.fault_arm.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 4, ctypes.c_long]
    layer.fault_met.restype = ctypes.c_long
    layer.fault_arm(b"/nowhere", 0, 0, 0, 0, 0)
    answers = os.fdopen(os.dup(1), "w")
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        pipes = [os.pipe() for _ in range(2)]
        child = os.fork()
        if child == 0:
            os._exit(_child(layer, json.loads(line), (pipes[0][1], pipes[1][1])))
        for _, end in pipes:
            os.close(end)
        out, err = _read([end for end, _ in pipes], child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for end, _ in pipes:
            os.close(end)
        print(json.dumps({"code": code, "out": out, "err": err, "calls": layer.fault_met()}), file=answers, flush=True)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2:])
