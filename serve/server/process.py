"""One running Triton: started with its health awaited, stopped without leaving anything behind."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import uuid
from typing import TYPE_CHECKING

from serve.server import guard
from serve.server.check import check_repository
from serve.server.install import Installation, TritonError, find_installation
from serve.server.settings import ServerSettings, admin_key, server_command
from serve.server.state import answers_ready, clear_up_after, load_state, state_file
from unet.processes import signals_held_back

if TYPE_CHECKING:
    from pathlib import Path

_SEGMENT_PREFIX = "unet-triton-"
_POLL_S = 0.05
_LOG_TAIL_LINES = 20
_LOG_TAIL_COLUMNS = 400


class TritonServer:
    """A server as a context manager: ready inside the block, gone after it, whatever ends the block.

    Beside the server runs its guard (``serve.server.guard``), which clears up even when this process is killed.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TritonServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The server's process, or None while there is none."""
        state = load_state(self.settings.state_dir) if self._guard is not None else None
        return None if state is None else state.server_pid

    def start(self) -> None:
        """Start the server and wait until it and every model in it are ready.

        Raises:
            TritonError: there is nothing to serve, one runs already, a port is taken, or the server ends or hangs;
                then its log's end is in the message.
        """
        settings = self.settings
        models = check_repository(settings.repository)
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        _require_none_running(settings.state_dir)
        for name, port in settings.ports.items():
            _require_free_port(settings.http_address if name == "http_port" else settings.address, name, port)
        installation = find_installation(settings.state_dir.resolve())
        settings.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._launch(installation, models)
            self._await_ready(models)
        except BaseException:
            self.stop()
            raise

    def _launch(self, installation: Installation, models: list[str]) -> None:
        settings = self.settings
        prefix = f"{_SEGMENT_PREFIX}{uuid.uuid4().hex[:12]}-"
        key_file, key = admin_key(settings)
        task = {
            "command": server_command(settings, installation, prefix, models, key),
            "state_file": str(state_file(settings.state_dir.resolve())),
            "state": {
                "shm_prefix": prefix,
                "stop_timeout_s": settings.stop_timeout_s,
                "address": settings.address,
                "http_address": settings.http_address,
                "http_port": settings.http_port,
                "grpc_port": settings.grpc_port,
                "repository": str(settings.repository.resolve()),
                "models": models,
                "log": str(settings.log.resolve()),
                "model_control": settings.model_control,
                "admin_key_file": str(key_file.resolve()),
            },
        }
        with settings.log.open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, json.dumps(task)],
                env=installation.environment(),
                cwd="/",
                # The guard stops the server when this pipe ends, and it ends with this process.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A session of its own: a terminal's Ctrl-C reaches us, and we end the server in order.
                start_new_session=True,
            )

    def _await_ready(self, models: list[str]) -> None:
        assert self._guard is not None
        settings = self.settings
        deadline = time.monotonic() + settings.start_timeout_s
        while not answers_ready(settings.http_address, settings.http_port, models):
            # Waiting for the guard is the clock: an early end is noticed at once.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(_POLL_S)
                raise TritonError(f"Triton ended while starting{self._log_tail()}")
            if time.monotonic() > deadline:
                raise TritonError(
                    f"Triton was not ready after {settings.start_timeout_s:g} s and was stopped{self._log_tail()}"
                )

    def _log_tail(self) -> str:
        lines = self.settings.log.read_text(encoding="utf-8", errors="replace").splitlines()
        # Triton's tables would fill the tail and say nothing about the fault.
        telling = [line[:_LOG_TAIL_COLUMNS] for line in lines if line.strip() and line[0] not in "|+"]
        tail = telling[-_LOG_TAIL_LINES:]
        return "; the end of {} is:\n{}".format(self.settings.log, "\n".join(tail) or "(empty)")

    def wait(self) -> None:
        """Wait until the server is stopped by someone else, as by ``python serve/triton.py stop``.

        Raises:
            TritonError: it ended by itself.
        """
        assert self._guard is not None
        if self._guard.wait() != guard.EXIT_STOPPED:
            raise TritonError(f"Triton ended by itself{self._log_tail()}")

    def detach(self) -> None:
        """Let the server outlive this process: ``stop_kept`` with the same ``state_dir`` stops it."""
        assert self._guard is not None
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(guard.DETACH)
            self._guard.stdin.close()
        self._guard.returncode = 0  # Someone else's from now on.
        self._guard = None

    def stop(self) -> None:
        """End the server and its children, at the latest after ``stop_timeout_s``, and remove their shared memory."""
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        with signals_held_back():
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()
            try:
                self._guard.wait(self.settings.stop_timeout_s + 2 * guard.SWEEP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._guard.kill()
                self._guard.wait()
            state = load_state(self.settings.state_dir)
            if state is not None and state.guard_pid == self._guard.pid:
                clear_up_after(state, self.settings.state_dir)
            self._guard = None


def _require_none_running(state_dir: Path) -> None:
    state = load_state(state_dir)
    if state is None:
        return
    if state.is_kept:
        raise TritonError(
            f"a server runs already (process {state.server_pid}, gRPC {state.address}:{state.grpc_port}): "
            "stop it with `make stop`, or give this one another --state_dir"
        )
    clear_up_after(state, state_dir)


def _require_free_port(address: str, name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except PermissionError as error:
            raise TritonError(f"port {port} needs more rights than you have: choose another with --{name}") from error
        except OSError as error:
            raise TritonError(
                f"port {port} of {address} cannot be listened on ({error.strerror}): stop what uses it, or choose "
                f"another with --{name}"
            ) from error
