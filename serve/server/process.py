"""One running Triton: started with its health awaited, stopped without leaving anything behind."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path

from serve.server import guard
from serve.server.addresses import in_url, require_free_port
from serve.server.check import check_repository
from serve.server.claims import Claims
from serve.server.command_line import Identity, KeyArgument, server_command
from serve.server.install import TritonError, find_installation
from serve.server.settings import ServerSettings, admin_key
from serve.server.state import answers_ready, clear_up, load_state, state_file
from unet.processes import signals_held_back

_SEGMENT_PREFIX, _ID_PREFIX, _LINKS_PREFIX = "unet-triton-", "unet-triton-", "unet-triton-links-"
# The python backend starts its processes by a line of shell, in which it does not quote these paths.
_PLAIN_PATH = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
_TAKEN_PORT = re.compile(r"Socket '.+:(\d+)' already in use")
_ROOT = Path(__file__).resolve().parents[2]
# The guard starts without site-packages, and finds this project's own modules all the same.
_GUARD = (
    f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from serve.server.guard import main; sys.exit(main(sys.argv[1]))"
)
_POLL_S, _METRICS_TIMEOUT_S = 0.05, 2.0
_LEAST_DISK_BYTES = 1 << 20
_LOG_TAIL_LINES = 20
_LOG_TAIL_COLUMNS = 400


class TritonServer:
    """A server as a context manager: ready inside the block, gone after it, whatever ends the block.

    Beside the server runs its guard (``serve.server.guard``), which clears up even when this process is killed.

    Attributes:
        settings: how it runs; once it was started, with IP addresses in the place of names.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._guard: subprocess.Popen[bytes] | None = None
        self._claims = Claims()

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
        models = check_repository(self.settings.repository, self.settings.require_signature)
        settings = self.settings = self.settings.resolved()
        settings.state_dir.mkdir(parents=True, exist_ok=True)
        _require_disk(settings.state_dir)
        try:
            self._claim()
            installation = find_installation(settings.state_dir.resolve())
            settings.log.parent.mkdir(parents=True, exist_ok=True)
            key_file, key = admin_key(settings)
            identity = _identity(settings.repository.resolve(), installation.backends)
            argument = KeyArgument.of(key_file, key)
            command = server_command(settings, installation, identity, models, argument.text)
            task: dict[str, object] = {"command": command, "environment": argument.environment}
            self._launch(task, installation.environment(), identity, models, key_file)
            self._await_ready(identity.server_id, models, key)
            self._tell_guard(guard.READY)
        except BaseException:
            self.stop()
            raise

    def _claim(self) -> None:
        """Make state folder and ports this server's own, and clear up after a former one.

        Raises:
            TritonError: another server has them.
        """
        settings = self.settings
        if not self._claims.take_state(settings.state_dir):
            state = load_state(settings.state_dir)
            known = state is not None and state.is_kept
            which = f"runs already (process {state.server_pid}, gRPC {state.grpc_url})" if state and known else "starts"
            raise TritonError(
                f"a server {which} with the state folder {settings.state_dir}: stop it with `make stop`, or give this "
                "one another --state_dir"
            )
        clear_up(settings.state_dir)
        self._claims.take_ports(settings.ports)
        for name, port in settings.ports.items():
            require_free_port(settings.http_address if name == "http_port" else settings.address, name, port)

    def _launch(
        self,
        task: dict[str, object],
        environment: dict[str, str],
        identity: Identity,
        models: list[str],
        key_file: Path,
    ) -> None:
        settings = self.settings
        task |= {
            "check": _check(settings),
            "state_file": str(state_file(settings.state_dir.resolve())),
            "state": {
                "server_id": identity.server_id,
                "shm_prefix": identity.shm_prefix,
                "links": identity.links,
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
                "public_key": str(settings.require_signature.resolve()) if settings.require_signature else "",
                "state_dir": str(settings.state_dir.resolve()),
                "restarts": settings.restarts,
                "restarted": 0,
            },
        }
        with settings.log.open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD, json.dumps(task)],
                env=environment,
                cwd="/",
                # The guard stops the server when this pipe ends, and it ends with this process.
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A session of its own: a terminal's Ctrl-C reaches us, and we end the server in order.
                start_new_session=True,
                # The guard holds the claims as long as it lives.
                pass_fds=self._claims.descriptors,
            )

    def _await_ready(self, server_id: str, models: list[str], key: str) -> None:
        assert self._guard is not None
        settings = self.settings
        deadline = time.monotonic() + settings.start_timeout_s
        while not (
            answers_ready(settings.http_address, settings.http_port, models, server_id, key) and self._has_metrics()
        ):
            # Waiting for the guard is the clock: an early end is noticed at once.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._guard.wait(_POLL_S)
                raise TritonError(f"Triton ended while starting{self._taken_port() or self._log_tail()}")
            if time.monotonic() > deadline:
                raise TritonError(
                    f"Triton was not ready after {settings.start_timeout_s:g} s and was stopped{self._log_tail()}"
                )

    def _has_metrics(self) -> bool:
        url = f"http://{in_url(self.settings.address)}:{self.settings.metrics_port}/metrics"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(url, timeout=_METRICS_TIMEOUT_S):
                return True
        except OSError:
            return False

    def _taken_port(self) -> str:
        """A port that another program took between our look at it and Triton's start."""
        found = _TAKEN_PORT.search(self.settings.log.read_text(encoding="utf-8", errors="replace"))
        return "" if found is None else f": port {found[1]} is in use: stop what uses it, or choose another port"

    def _log_tail(self) -> str:
        lines = self.settings.log.read_text(encoding="utf-8", errors="replace").splitlines()
        # Triton's tables would fill the tail and say nothing about the fault.
        telling = [line[:_LOG_TAIL_COLUMNS] for line in lines if line.strip() and line[0] not in "|+"]
        tail = telling[-_LOG_TAIL_LINES:]
        return "; the end of {} is:\n{}".format(self.settings.log, "\n".join(tail) or "(empty)")

    def wait(self) -> None:
        """Wait until the server is stopped by someone else, as by ``python serve/triton.py stop``.

        Raises:
            TritonError: it ended by itself, and is not started again.
        """
        assert self._guard is not None
        if self._guard.wait() != guard.EXIT_STOPPED:
            raise TritonError(f"Triton ended by itself{self._log_tail()}")

    def detach(self) -> None:
        """Let the server outlive this process: ``stop_kept`` with the same ``state_dir`` stops it."""
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._tell_guard(guard.DETACH)
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.close()
        self._guard.returncode = 0  # Someone else's from now on.
        self._guard = None
        self._claims.release()

    def _tell_guard(self, word: bytes) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._guard.stdin.write(word)
            self._guard.stdin.flush()

    def stop(self) -> None:
        """End the server and its children, at the latest after ``stop_timeout_s``, and remove their shared memory."""
        with signals_held_back():
            if self._guard is not None:
                self._end_guard(self._guard)
                self._guard = None
                clear_up(self.settings.state_dir)
            self._claims.release()

    def _end_guard(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(self.settings.stop_timeout_s + 2 * guard.SWEEP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _check(settings: ServerSettings) -> list[str]:
    """The command line that checks again what is served, before a new start after a crash."""
    line = [sys.executable, str(_ROOT / "serve" / "triton.py"), "check"]
    line += ["--model_repository", str(settings.repository.resolve())]
    if settings.require_signature is not None:
        line += ["--require_signature", str(settings.require_signature.resolve())]
    return line


def _require_disk(folder: Path) -> None:
    """On a full disk the server would fail later, without the room to say so in its log."""
    free = shutil.disk_usage(folder).free
    if free < _LEAST_DISK_BYTES:
        raise TritonError(
            f"the disk of {folder} has {free >> 10} KiB free, too little for state and log: free some space, or choose "
            "another --state_dir"
        )


def _identity(repository: Path, backends: Path) -> Identity:
    """What the server to be started has for itself, with links in the place of paths that the backend cannot take.

    Raises:
        TritonError: there is no folder for such links.
    """
    word = uuid.uuid4().hex[:12]
    prefix = f"{_SEGMENT_PREFIX}{uuid.uuid4().hex[:12]}-"
    if _PLAIN_PATH.fullmatch(str(repository)) and _PLAIN_PATH.fullmatch(str(backends)):
        return Identity(f"{_ID_PREFIX}{word}", prefix, repository, backends)
    for parent in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if _PLAIN_PATH.fullmatch(parent):
            with contextlib.suppress(OSError):
                links = Path(tempfile.mkdtemp(prefix=_LINKS_PREFIX, dir=parent))
                break
    else:
        raise TritonError(
            f"the python backend takes no path with spaces or other special characters, as {repository} or {backends} "
            "has, and no temporary folder can be written to that could hold links to them: name one with TMPDIR"
        )
    (links / "models").symlink_to(repository)
    (links / "backends").symlink_to(backends)
    return Identity(f"{_ID_PREFIX}{word}", prefix, links / "models", links / "backends", str(links))
