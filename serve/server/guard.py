"""Keeps one tritonserver, and leaves nothing of it behind, whatever happens to the process that asked for it.

Started by ``serve.server.process`` as a process of its own, in a session of its own. Only the standard library, so that
it runs with ``python -I -S`` and is there in 20 ms. It stops the server

* when its standard input ends, because the process that started it closed the pipe or ended, by SIGKILL too,
  unless one byte, ``DETACH``, came before;
* on SIGTERM, SIGINT or SIGHUP.

To stop is SIGTERM, a bounded wait, SIGKILL for the server's process group, and removing its shared-memory segments.
The same sweeping follows when the server ends by itself. The guard adopts what the server orphans, so that it can wait
for every last descendant. If the guard itself is killed, the kernel sends the server SIGTERM.

While the server runs, the guard also has it release the shared memory of clients that were killed.
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
import threading
import time
from pathlib import Path
from typing import Any

DETACH = b"d"
SHARED_MEMORY = Path("/dev/shm")
SWEEP_TIMEOUT_S = 5.0
# What a client's segments and regions are called: this, its process number, a dash and a random word.
CLIENT_PREFIX = "unet-client-"
ADMIN_KEY_HEADER = "admin-key"
_REGION_KINDS = ("systemsharedmemory", "cudasharedmemory")
_RELEASE_INTERVAL_S, _RELEASE_TIMEOUT_S = 5.0, 2.0
EXIT_STOPPED, EXIT_SERVER_ENDED = 0, 1

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with its number this identifies it. None when it has ended.

    Field 22 of ``/proc/PID/stat``; the name in field 2 may itself hold spaces and parentheses. A zombie has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def remove_segments(prefix: str) -> list[str]:
    """Remove the shared-memory segments whose name begins with ``prefix``; returns their names."""
    removed = []
    for path in SHARED_MEMORY.glob(f"{prefix}*"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            removed.append(path.name)
    return removed


def is_of_dead_client(name: str) -> bool:
    """Whether a segment or region belongs to a client of this machine whose process has ended."""
    owner = name[len(CLIENT_PREFIX) :].partition("-")[0]
    if not name.startswith(CLIENT_PREFIX) or not owner.isdecimal():
        return False
    try:
        os.kill(int(owner), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):  # another user's, alive; or no process number
        return False
    return start_ticks(int(owner)) is None


class Regions:
    """The shared memory that clients have registered with a running server.

    Args:
        address: IP address of the server's HTTP.
        port: its port.
        key: the admin key.
    """

    def __init__(self, address: str, port: int, key: str) -> None:
        self._address, self._port, self._key = address, port, key

    def of_dead_clients(self) -> dict[str, int]:
        """The bytes of each region whose client has ended, by the region's name.

        Raises:
            OSError: the server does not answer.
        """
        return {name: size for kind in _REGION_KINDS for name, size in self._dead(kind).items()}

    def release(self) -> dict[str, int]:
        """Have the server give those regions back; returns what `of_dead_clients` found.

        Raises:
            OSError: the server does not answer.
        """
        released = {}
        for kind in _REGION_KINDS:
            for name, size in self._dead(kind).items():
                self._ask("POST", f"/v2/{kind}/region/{name}/unregister")
                released[name] = size
        return released

    def _dead(self, kind: str) -> dict[str, int]:
        regions = json.loads(self._ask("GET", f"/v2/{kind}/status") or b"[]")
        return {one["name"]: int(one["byte_size"]) for one in regions if is_of_dead_client(one["name"])}

    def _ask(self, method: str, path: str) -> bytes:
        import http.client  # takes as long to load as all the rest of the guard

        connection = http.client.HTTPConnection(self._address, self._port, timeout=_RELEASE_TIMEOUT_S)
        try:
            connection.request(method, path, headers={ADMIN_KEY_HEADER: self._key})
            response = connection.getresponse()
            body = response.read()
        except http.client.HTTPException as error:
            raise OSError(f"HTTP port {self._port} does not answer in HTTP: {error}") from error
        finally:
            connection.close()
        return body if response.status == http.HTTPStatus.OK else b""


def kill_group(group: int) -> None:
    """SIGKILL to a process group, if there is one."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def remove_links(links: str) -> None:
    """Remove the folder of links that a server was started with, if it had one."""
    if links:
        shutil.rmtree(links, ignore_errors=True)


class Guard:
    """One server from its start to its end.

    Args:
        command: the server's command line.
        environment: what the server has in its environment beside this process's own.
        state_file: where to write ``state`` and both processes' identity while the server lives.
        state: what ``serve.server.state`` finds there again. The guard itself uses ``shm_prefix``, ``stop_timeout_s``,
            ``links`` and where HTTP answers.
    """

    def __init__(self, command: list[str], environment: dict[str, str], state_file: str, state: dict[str, Any]) -> None:
        self._command, self._environment = command, environment
        self._state_file = Path(state_file)
        self._state = state
        self._server = 0
        self._ending = threading.Event()
        self._status: int | None = None
        self._wakeup, write_end = os.pipe()
        for descriptor in (self._wakeup, write_end):
            os.set_blocking(descriptor, False)
        signal.set_wakeup_fd(write_end)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            # The number arrives through the pipe; the handler is there so that there is one.
            signal.signal(number, lambda *_: None)
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def run(self) -> int:
        """Start the server and keep it; returns the exit code."""
        me = os.getpid()

        def die_with_guard() -> None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != me:
                os._exit(1)

        # This process has one thread, so code between fork and exec is safe.
        process = subprocess.Popen(
            self._command,
            env={**os.environ, **self._environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=die_with_guard,
        )
        self._server = process.pid
        try:
            self._write_state()
            threading.Thread(target=self._release_regions, daemon=True).start()
            stopped = self._keep()
            if stopped:
                self._stop()
        finally:
            self._sweep()
            process.returncode = self._status
        return EXIT_STOPPED if stopped else EXIT_SERVER_ENDED

    def _keep(self) -> bool:
        """Wait until the server has ended (False) or must be stopped (True)."""
        watched = [self._wakeup, 0]
        while self._status is None:
            ready, _, _ = select.select(watched, [], [])
            if 0 in ready:
                if not os.read(0, 1):
                    return True
                watched.remove(0)
            if self._wakeup in ready and self._take_signals() - {signal.SIGCHLD}:
                return True
        if os.WIFSIGNALED(self._status):
            reason = f"by signal {os.WTERMSIG(self._status)}"
        else:
            reason = f"with exit code {os.WEXITSTATUS(self._status)}"
        sys.stderr.write(f"tritonserver ended {reason}\n")
        return False

    def _stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._server, signal.SIGTERM)
        deadline = time.monotonic() + self._state["stop_timeout_s"]
        while self._status is None and (left := deadline - time.monotonic()) > 0:
            if select.select([self._wakeup], [], [], left)[0]:
                self._take_signals()
        if self._status is None:
            sys.stderr.write(f"tritonserver did not stop within {self._state['stop_timeout_s']:g} s and is killed\n")

    def _take_signals(self) -> set[int]:
        """The signals that came, after reaping every child that ended."""
        numbers = set(os.read(self._wakeup, 1024))
        self._reap()
        return numbers

    def _reap(self) -> bool:
        """Collect the children that ended; returns whether any are left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == self._server:
                    self._status = status
                if pid == 0:
                    return True
        return False

    def _sweep(self) -> None:
        """Leave no process, no segment and no state file."""
        self._ending.set()
        kill_group(self._server)
        deadline = time.monotonic() + SWEEP_TIMEOUT_S
        while self._reap() and (left := deadline - time.monotonic()) > 0:
            if select.select([self._wakeup], [], [], left)[0]:
                os.read(self._wakeup, 1024)
        remove_segments(self._state["shm_prefix"])
        remove_links(self._state["links"])
        with contextlib.suppress(OSError, ValueError, KeyError):
            # Another server's state is not this guard's to remove.
            if json.loads(self._state_file.read_text(encoding="utf-8"))["guard_pid"] == os.getpid():
                self._state_file.unlink()

    def _release_regions(self) -> None:
        """Release the shared memory of dead clients now and then, until the server ends."""
        while not self._ending.wait(_RELEASE_INTERVAL_S):
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
            "server_pid": self._server,
            "server_start": start_ticks(self._server),
        }
        aside = self._state_file.with_suffix(".new")
        aside.write_text(json.dumps({**self._state, **identity}, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, self._state_file)


if __name__ == "__main__":
    sys.exit(Guard(**json.loads(sys.argv[1])).run())
