"""Keeps one tritonserver, and leaves nothing of it behind, whatever happens to the process that asked for it.

Started by ``serve.server.process`` as a process of its own, in a session of its own. Only the standard library, so that
it runs with ``python -I -S`` and is there in 20 ms. It stops the server

* when its standard input ends, because the process that started it closed the pipe or ended, by SIGKILL too,
  unless one byte, ``DETACH``, came before;
* on SIGTERM, SIGINT or SIGHUP.

To stop is SIGTERM, a bounded wait, SIGKILL for the server's process group, and removing its shared-memory segments.
The same sweeping follows when the server ends by itself. The guard adopts what the server orphans, so that it can wait
for every last descendant. If the guard itself is killed, the kernel sends the server SIGTERM.

A server that was ready once, ``READY``, and then crashes is checked and started again, a bounded number of times. While
the server runs, the guard also has it release the shared memory of clients that were killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from serve.server.regions import Regions, remove_segments, start_ticks

READY, DETACH = b"r", b"d"
SWEEP_TIMEOUT_S = 5.0
EXIT_STOPPED, EXIT_SERVER_ENDED = 0, 1
_RELEASE_INTERVAL_S = 5.0
# In which crashes are counted, and the longest pause before a start after one.
_CRASHES_WITHIN_S, _LONGEST_PAUSE_S = 3600.0, 30.0

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def kill_group(group: int) -> None:
    """SIGKILL to a process group, if there is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def remove_links(links: str) -> None:
    """Remove the folder of links that a server was started with, if it had one."""
    if links:
        shutil.rmtree(links, ignore_errors=True)


class Guard:
    """One server from its start to its end, whatever crashes it meanwhile.

    Args:
        command: the server's command line.
        environment: what the server has in its environment beside this process's own.
        check: command line that ends with 0 if what is served may be loaded again.
        state_file: where to write ``state`` and both processes' identity while the server lives.
        state: what ``serve.server.state`` finds there again. The guard itself uses ``shm_prefix``, ``stop_timeout_s``,
            ``links``, ``restarts``, ``models``, ``model_control`` and where HTTP answers.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], check: list[str], state_file: str, state: dict[str, Any]
    ) -> None:
        self._command, self._environment, self._check = command, environment, check
        self._state_file = Path(state_file)
        self._state = state
        self._what, self._child = "", 0
        self._status: int | None = None
        self._was_ready = self._told = False
        self._crashes: list[float] = []
        self._wakeup, write_end = os.pipe()
        self._watched = [self._wakeup, 0]
        for descriptor in (self._wakeup, write_end):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(write_end)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            # The number arrives through the pipe; the handler is there so that there is one.
            signal.signal(number, lambda *_: None)
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def run(self) -> int:
        """Start the server and keep it; returns the exit code."""
        try:
            stopped = self._live("tritonserver", self._command)
            while not stopped and self._may_start_again():
                stopped = self._start_again()
        finally:
            remove_links(self._state["links"])
            with contextlib.suppress(OSError, ValueError, KeyError):
                # Another server's state is not this guard's to remove.
                if json.loads(self._state_file.read_text(encoding="utf-8"))["guard_pid"] == os.getpid():
                    self._state_file.unlink()
        return EXIT_STOPPED if stopped else EXIT_SERVER_ENDED

    def _live(self, what: str, command: list[str]) -> bool:
        """Run a child until it ends (False) or the guard is told to stop (True), and leave nothing of it."""
        me = os.getpid()

        def die_with_guard() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != me:
                os._exit(1)

        # This process has one thread, so code between fork and exec is safe.
        process = subprocess.Popen(
            command,
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_guard,
        )
        self._what, self._child, self._status = what, process.pid, None
        try:
            self._write_state()
            stopped = self._keep()
            if stopped:
                self._stop()
        finally:
            self._sweep()
            process.returncode = self._status
        return stopped

    def _keep(self) -> bool:
        """Wait until the child has ended (False) or must be stopped (True)."""
        release_at = time.monotonic() + _RELEASE_INTERVAL_S
        while self._status is None:
            if self._is_told_to_stop(max(0.0, release_at - time.monotonic())):
                return True
            if time.monotonic() >= release_at:
                self._release_regions()
                release_at = time.monotonic() + _RELEASE_INTERVAL_S
        return False

    def _is_told_to_stop(self, within_s: float) -> bool:
        """Wait for the next thing that happens; whether the word to stop has come."""
        ready, _, _ = select.select(self._watched, [], [], within_s)
        if 0 in ready:
            word = os.read(0, 1)
            if not word:
                return True
            self._was_ready = True
            if word == DETACH:
                self._watched.remove(0)
        if self._wakeup in ready:
            self._take_signals()
        return self._told

    def _may_start_again(self) -> bool:
        """Whether a server that was ready once crashed, and has not done so too often."""
        assert self._status is not None
        if os.WIFSIGNALED(self._status):
            reason = f"by signal {os.WTERMSIG(self._status)}"
        else:
            reason = f"with exit code {os.WEXITSTATUS(self._status)}"
        sys.stderr.write(f"{self._what} ended {reason}\n")
        if self._status == 0 or not self._was_ready:
            return False
        now = time.monotonic()
        self._crashes = [then for then in self._crashes if now - then < _CRASHES_WITHIN_S] + [now]
        if len(self._crashes) > self._state["restarts"]:
            sys.stderr.write(f"it is not started again: {len(self._crashes)} crashes or failed starts within an hour\n")
            return False
        return True

    def _start_again(self) -> bool:
        """Start the server again, if what it serves passes the check, and keep it until it ends or must be stopped."""
        self._take_over_models()
        deadline = time.monotonic() + min(_LONGEST_PAUSE_S, 2.0 ** min(len(self._crashes), 10) - 2)
        while (left := deadline - time.monotonic()) > 0:
            if self._is_told_to_stop(left):
                return True
        if self._live("the check before a new start", self._check):
            return True
        if self._status:
            return False
        sys.stderr.write("tritonserver is started again\n")
        self._state["restarted"] += 1
        return self._live("tritonserver", self._command)

    def _take_over_models(self) -> None:
        """Load again what was loaded while the server ran."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            models = json.loads(self._state_file.read_text(encoding="utf-8"))["models"]
            if self._state["model_control"] == "explicit":
                self._command += [f"--load-model={model}" for model in models if model not in self._state["models"]]
            self._state["models"] = models

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, signal.SIGTERM)
        deadline = time.monotonic() + self._state["stop_timeout_s"]
        while self._status is None and (left := deadline - time.monotonic()) > 0:
            if select.select([self._wakeup], [], [], left)[0]:
                self._take_signals()
        if self._status is None:
            sys.stderr.write(f"tritonserver did not stop within {self._state['stop_timeout_s']:g} s and is killed\n")

    def _take_signals(self) -> None:
        """Note whether one of the signals that came tells to stop, and reap every child that ended."""
        self._told |= bool(set(os.read(self._wakeup, 1024)) - {signal.SIGCHLD})
        self._reap()

    def _reap(self) -> bool:
        """Collect the children that ended; returns whether any are left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == self._child:
                    self._status = status
                if pid == 0:
                    return True
        return False

    def _sweep(self) -> None:
        """Leave no process and no segment."""
        kill_group(self._child)
        deadline = time.monotonic() + SWEEP_TIMEOUT_S
        while self._reap() and (left := deadline - time.monotonic()) > 0:
            if select.select([self._wakeup], [], [], left)[0]:
                self._take_signals()
        remove_segments(self._state["shm_prefix"])

    def _release_regions(self) -> None:
        """Have the server release the shared memory of dead clients."""
        # A server that starts, or has too much to do, answers the next time.
        with contextlib.suppress(OSError, ValueError, KeyError):
            key = Path(self._state["admin_key_file"]).read_text(encoding="utf-8").strip()
            regions = Regions(self._state["http_address"], self._state["http_port"], key)
            for name, size in regions.release().items():
                sys.stderr.write(f"released {name}, {size} bytes that a client left when it was killed\n")

    def _write_state(self) -> None:
        me = os.getpid()
        identity = {
            "guard_pid": me,
            "guard_start": start_ticks(me),
            "server_pid": self._child,
            "server_start": start_ticks(self._child),
        }
        aside = self._state_file.with_suffix(".new")
        aside.write_text(json.dumps({**self._state, **identity}, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self._state_file)


def main(task: str) -> int:
    """Keep the server that a JSON object of `Guard`'s arguments describes."""
    return Guard(**json.loads(task)).run()
