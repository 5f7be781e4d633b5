"""What is known of a server between one command and the next: who keeps it, where it listens, what it may leave."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from serve.server.guard import SWEEP_TIMEOUT_S, kill_group, remove_segments, start_ticks
from serve.server.install import TritonError

if TYPE_CHECKING:
    from pathlib import Path

_STATE_FILE = "server.json"
_HEALTH_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class ServerState:
    """One server that was started, as its guard wrote it down.

    A process number alone may since have been given to another process, so each comes with its start, in clock ticks
    since boot.
    """

    guard_pid: int
    guard_start: int
    server_pid: int
    server_start: int
    shm_prefix: str
    stop_timeout_s: float
    address: str
    http_address: str
    http_port: int
    grpc_port: int
    repository: str
    models: list[str]
    log: str
    model_control: str
    admin_key_file: str

    @property
    def is_kept(self) -> bool:
        """Whether its guard lives; if not, whatever is left of the server is an orphan."""
        return start_ticks(self.guard_pid) == self.guard_start

    @property
    def is_ready(self) -> bool:
        """Whether the server and all its models answer that they are."""
        return answers_ready(self.http_address, self.http_port, self.models)


def state_file(state_dir: Path) -> Path:
    """Where a server's state is."""
    return state_dir / _STATE_FILE


def load_state(state_dir: Path) -> ServerState | None:
    """The state of the server that was started with this folder, if there is one.

    Raises:
        TritonError: the file is not such a state.
    """
    path = state_file(state_dir)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return ServerState(**{field.name: values[field.name] for field in fields(ServerState)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TritonError(f"{path} is not the state of a server: see with ps what runs, and delete it") from error


def answers_ready(http_address: str, http_port: int, models: list[str]) -> bool:
    """Whether the server behind a port, and every one of ``models`` in it, says that it is ready."""
    connection = http.client.HTTPConnection(http_address, http_port, timeout=_HEALTH_TIMEOUT_S)
    try:
        for path in ("/v2/health/ready", *(f"/v2/models/{model}/ready" for model in models)):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            if response.status != http.HTTPStatus.OK:
                return False
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def stop_kept(state_dir: Path) -> bool:
    """Stop the server that was started with this folder, and clear up after one whose guard was killed.

    Returns:
        Whether a server was running.

    Raises:
        TritonError: it belongs to another user.
    """
    state = load_state(state_dir)
    if state is None:
        return False
    was_running = state.is_kept
    if was_running:
        try:
            _end_guard(state)
        except PermissionError as error:
            raise TritonError(f"process {state.guard_pid} belongs to another user, who must stop it") from error
    clear_up_after(state, state_dir)
    return was_running


def clear_up_after(state: ServerState, state_dir: Path) -> None:
    """Remove what is left of a server whose guard is no more: nothing, unless the guard was killed."""
    if start_ticks(state.server_pid) == state.server_start:
        kill_group(state.server_pid)
    remove_segments(state.shm_prefix)
    state_file(state_dir).unlink(missing_ok=True)


def _end_guard(state: ServerState) -> None:
    """SIGTERM, then SIGKILL when the guard exceeds its own bounds."""
    with contextlib.suppress(ProcessLookupError):
        guard = os.pidfd_open(state.guard_pid)
        try:
            for number in (signal.SIGTERM, signal.SIGKILL):
                # The descriptor stands for one process for good; checked after opening, it is the right one.
                if start_ticks(state.guard_pid) != state.guard_start:
                    return
                signal.pidfd_send_signal(guard, number)
                if select.select([guard], [], [], state.stop_timeout_s + 2 * SWEEP_TIMEOUT_S)[0]:
                    return
        finally:
            os.close(guard)
