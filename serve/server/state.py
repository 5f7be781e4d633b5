"""What is known of a server between one command and the next: who keeps it, where it listens, what it may leave."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import time
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from serve.server.addresses import in_url
from serve.server.claims import lock_state
from serve.server.guard import SWEEP_TIMEOUT_S, kill_group, remove_links
from serve.server.install import TritonError
from serve.server.regions import ADMIN_KEY_HEADER, Regions, remove_segments, start_ticks
from unet.files import read_json, write_json

_STATE_FILE = "server.json"
_HEALTH_TIMEOUT_S = 2.0
_POLL_S = 0.01


@dataclass(frozen=True)
class ServerState:
    """One server that was started, as its guard wrote it down.

    A process number alone may since have been given to another process, so each comes with its start, in clock ticks
    since boot.

    Attributes:
        server_id: a random word that the server itself gives as its name: whatever else answers on its port is not it.
        address: IP address of gRPC and the metrics.
        http_address: IP address of HTTP.
        links: folder of links that the server was started with; empty if it needed none.
        public_key: file with the key that must have signed what it loads; empty if none must.
        state_dir: that it was started with.
        restarted: how often it crashed and was started again.
    """

    guard_pid: int
    guard_start: int
    server_pid: int
    server_start: int
    server_id: str
    shm_prefix: str
    links: str
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
    public_key: str = ""
    state_dir: str = ""
    restarted: int = 0

    @property
    def grpc_url(self) -> str:
        """Where clients connect."""
        return f"{in_url(self.address)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Where clients of the HTTP protocol connect."""
        return f"{in_url(self.http_address)}:{self.http_port}"

    @property
    def is_kept(self) -> bool:
        """Whether its guard lives; if not, whatever is left of the server is an orphan."""
        return start_ticks(self.guard_pid) == self.guard_start

    @property
    def is_ready(self) -> bool:
        """Whether this very server says that it and all its models are ready."""
        return answers_ready(self.http_address, self.http_port, self.models, self.server_id, self.admin_key)

    @property
    def admin_key(self) -> str:
        """The admin key; empty for users who cannot read it."""
        try:
            return Path(self.admin_key_file).read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    @property
    def regions(self) -> Regions:
        """The shared memory that clients have registered with it."""
        return Regions(self.http_address, self.http_port, self.admin_key)


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
        values = read_json(path)
        # A server that was started before a setting was there runs without it, and can be stopped.
        known = [field.name for field in fields(ServerState) if field.name in values or field.default is MISSING]
        return ServerState(**{name: values[name] for name in known})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise TritonError(f"{path} is not the state of a server: see with ps what runs, and delete it") from error


def note_model(state: ServerState, model: str) -> None:
    """Note that a server also serves a model, so that it is watched, asked after, and loaded again after a crash."""
    if not state.state_dir:  # an older release started it
        return
    path = state_file(Path(state.state_dir))
    values = read_json(path)
    if values["server_id"] == state.server_id and model not in values["models"]:
        write_json(path, {**values, "models": [*values["models"], model]})


def server_name(http_address: str, http_port: int, key: str) -> str:
    """The name that the server behind a port gives, which is its ``server_id`` if this project started it.

    Raises:
        OSError: no server answers there.
    """
    try:
        return str(json.loads(_get(http_address, http_port, key, ["/v2"]))["name"])
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"what answers at port {http_port} is no Triton") from error


def answers_ready(http_address: str, http_port: int, models: list[str], server_id: str, key: str) -> bool:
    """Whether a server, and every one of ``models`` in it, says that it is ready.

    Args:
        http_address: IP address of its HTTP.
        http_port: its port.
        models: that must be ready.
        server_id: the name that it must give; another server's answer does not count.
        key: the admin key.
    """
    paths = ["/v2/health/ready", *(f"/v2/models/{model}/ready" for model in models)]
    try:
        if server_name(http_address, http_port, key) != server_id:
            return False
        _get(http_address, http_port, key, paths)
    except OSError:
        return False
    return True


def _get(http_address: str, http_port: int, key: str, paths: list[str]) -> bytes:
    """The last of some pages of one server, each of which must be there."""
    connection = http.client.HTTPConnection(http_address, http_port, timeout=_HEALTH_TIMEOUT_S)
    try:
        for path in paths:
            connection.request("GET", path, headers={ADMIN_KEY_HEADER: key})
            response = connection.getresponse()
            body = response.read()
            if response.status != http.HTTPStatus.OK:
                raise OSError(f"port {http_port} answers {path} with {response.status} {response.reason}")
    except http.client.HTTPException as error:
        raise OSError(f"what answers at port {http_port} does not speak HTTP") from error
    finally:
        connection.close()
    return body


def stop_kept(state_dir: Path) -> bool:
    """Stop the server that was started with this folder, and clear up after one whose guard was killed.

    Returns:
        Whether a server was running.

    Raises:
        TritonError: it belongs to another user, or is only being started.
    """
    if not state_dir.is_dir():
        return False
    state = load_state(state_dir)
    if state is None:
        lock = lock_state(state_dir)
        if lock is None:
            raise TritonError(f"a server is being started or stopped with {state_dir}: run this again in a moment")
        os.close(lock)
        return False
    was_running = state.is_kept
    if was_running:
        try:
            _end_guard(state)
        except PermissionError as error:
            raise TritonError(f"process {state.guard_pid} belongs to another user, who must stop it") from error
    lock = lock_state(state_dir)
    if lock is not None:  # else another server is being started there, which clears up itself
        try:
            clear_up(state_dir)
        finally:
            os.close(lock)
    return was_running


def clear_up(state_dir: Path) -> None:
    """Remove what is left of a server whose guard has ended: nothing, unless the guard was killed.

    Whoever calls this holds the folder's lock, so that no other server's state is removed.
    """
    state = load_state(state_dir)
    if state is None or state.is_kept:
        return
    if start_ticks(state.server_pid) == state.server_start:
        kill_group(state.server_pid)
        # Its ports are free when it is gone.
        deadline = time.monotonic() + SWEEP_TIMEOUT_S
        while start_ticks(state.server_pid) == state.server_start and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    remove_segments(state.shm_prefix)
    remove_links(state.links)
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
