"""How a server runs, and the key to its administration."""

from __future__ import annotations

import dataclasses
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from serve.server.addresses import in_url, is_loopback, listen_address
from serve.server.install import TritonError
from unet.config import setting
from unet.files import fsync
from unet.tracing import traces_url

MODEL_CONTROL = ("none", "explicit")

_ADMIN_KEY_FILE = "admin.key"
_LEAST_KEY_LENGTH = 16


@dataclass(frozen=True)
class ServerSettings:
    """How a server runs.

    Attributes:
        repository: the model repository.
        log: file for what the server says; each server starts it empty.
        state_dir: folder for what the next command, or the next server, may use again.
        http_port: of the HTTP protocol, which also tells health.
        grpc_port: of the gRPC protocol.
        metrics_port: of Prometheus' metrics.
        address: that gRPC and the metrics listen on: IPv4, IPv6 or a name.
        http_address: that HTTP listens on, likewise. Clients speak gRPC, HTTP tells health, and the known holes of this
            Triton's HTTP are open to everybody who reaches it. So it stays on this machine, whatever ``address`` is.
        start_timeout_s: longest wait for readiness.
        stop_timeout_s: longest wait for an orderly end, after which the server is killed.
        restarts: how often within an hour a server that was ready and crashed is started again; 0 leaves it ended.
        model_control: "none", or "explicit": the holder of the admin key can load and unload models.
        admin_key_file: file with that key; by default one in ``state_dir``, made when it is missing.
        tls_cert: PEM file with the server's certificate; gRPC is encrypted then, and HTTP tells health only.
        tls_key: PEM file with its private key.
        tls_client_ca: PEM file with the authority whose certificates clients must show.
        require_signature: file with a public key of minisign's, which must have signed every version that is served.
        response_cache_mib: memory for answers that are kept; 0 keeps none.
        otlp: http address of an OpenTelemetry collector that gets a trace of every request; empty for none.
    """

    repository: Path
    log: Path
    state_dir: Path
    http_port: int = setting(8000, "port of HTTP and health")
    grpc_port: int = setting(8001, "port of gRPC")
    metrics_port: int = setting(8002, "port of the metrics")
    address: str = setting("127.0.0.1", "of gRPC and metrics, IPv4, IPv6 or a name; the default is this machine only")
    http_address: str = setting("127.0.0.1", "of HTTP, which only health needs")
    start_timeout_s: float = setting(120.0, "longest wait for readiness")
    stop_timeout_s: float = setting(30.0, "longest wait for an orderly end")
    restarts: int = setting(5, "how often within an hour a server that crashed is started again")
    model_control: str = setting("none", "explicit: the admin key loads and unloads", choices=MODEL_CONTROL)
    admin_key_file: Path | None = setting(None, "file with that key; by default one in --state_dir", kind=Path)
    tls_cert: Path | None = setting(None, "PEM certificate for gRPC; HTTP then tells health only", kind=Path)
    tls_key: Path | None = setting(None, "PEM file with its private key", kind=Path)
    tls_client_ca: Path | None = setting(None, "PEM authority whose certificates clients must show", kind=Path)
    require_signature: Path | None = setting(None, "minisign public key that must have signed the models", kind=Path)
    response_cache_mib: int = setting(0, "memory for answers that are kept; 0 keeps none")
    otlp: str = setting("", "http://HOST:4318 of an OpenTelemetry collector, which gets a trace of every request")

    def __post_init__(self) -> None:
        for name, port in self.ports.items():
            if not 1 <= port <= 65535:
                raise TritonError(f"{name} is {port}; ports go from 1 to 65535")
        if len(set(self.ports.values())) < len(self.ports):
            raise TritonError(f"the ports {', '.join(map(str, self.ports.values()))} must differ from each other")
        for name in ("start_timeout_s", "stop_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TritonError(f"{name} is {getattr(self, name):g}; it must be positive")
        if self.restarts < 0:
            raise TritonError(f"restarts is {self.restarts}; it must be 0 or more")
        if self.model_control not in MODEL_CONTROL:
            raise TritonError(f"model_control is {self.model_control}; there are {' and '.join(MODEL_CONTROL)}")
        if self.response_cache_mib < 0:
            raise TritonError(f"response_cache_mib is {self.response_cache_mib}; it must be 0 or more")
        try:
            traces_url(self.otlp or "http://localhost")
        except ValueError as error:
            raise TritonError(str(error)) from error
        self._check_files()

    def _check_files(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and not self.tls_cert):
            raise TritonError("tls_cert and tls_key go together, and tls_client_ca needs both")
        for path in (self.admin_key_file, self.tls_cert, self.tls_key, self.tls_client_ca, self.require_signature):
            if path is not None and not os.access(path, os.R_OK):
                raise TritonError(f"{path} does not exist or cannot be read: name another file")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches gRPC."""
        return is_loopback(self.address)

    @property
    def ports(self) -> dict[str, int]:
        """The ports by the names of their settings."""
        return {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}

    @property
    def grpc_url(self) -> str:
        """Where clients connect."""
        return f"{in_url(self.address)}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Where clients of the HTTP protocol connect."""
        return f"{in_url(self.http_address)}:{self.http_port}"

    def resolved(self) -> ServerSettings:
        """The same with IP addresses in the place of names.

        Raises:
            TritonError: a name is not known.
        """
        return dataclasses.replace(
            self, address=listen_address(self.address), http_address=listen_address(self.http_address)
        )


@dataclass(frozen=True)
class WatchSettings:
    """How a server is watched.

    Attributes:
        interval_s: between one canary and the next, in seconds.
        timeout_s: in which the server must answer the canary, or another request before it.
        failures: in a row, after which a model is loaded again.
    """

    interval_s: float = setting(10.0, "seconds between canaries")
    timeout_s: float = setting(60.0, "longest wait for a canary's answer, or for any other")
    failures: int = setting(2, "failed canaries in a row after which a model is loaded again")

    def __post_init__(self) -> None:
        for name in ("interval_s", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TritonError(f"{name} is {getattr(self, name):g}; it must be positive")
        if self.failures < 1:
            raise TritonError(f"failures is {self.failures}; it must be at least 1")


def admin_key(settings: ServerSettings) -> tuple[Path, str]:
    """The file with the key to model control, made if it is missing, and the key.

    Raises:
        TritonError: the file's content is too short for a key, or has characters that a header cannot carry.
    """
    path = settings.admin_key_file or settings.state_dir / _ADMIN_KEY_FILE
    if not path.exists():
        _write_key(path, secrets.token_urlsafe(32))
    return path, read_admin_key(path)


def _write_key(path: Path, key: str) -> None:
    """Write the file whole, for its owner alone, or not at all. The caller holds the lock of the state folder."""
    aside = path.with_name(f".{path.name}.new")
    aside.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(aside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as stream:
            stream.write(key + "\n")
            stream.flush()
            fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise TritonError(
            f"the admin key cannot be written to {path} ({error.strerror}): free some space, or choose another "
            "--state_dir"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def read_admin_key(path: Path) -> str:
    """The key in a file.

    Raises:
        TritonError: it cannot be read, or is not a key.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise TritonError(f"{path} holds the admin key and cannot be read: {error.strerror}") from error
    if len(key) < _LEAST_KEY_LENGTH or not all(letter.isalnum() or letter in "-_" for letter in key):
        raise TritonError(
            f"{path} is no admin key: it must be {_LEAST_KEY_LENGTH} or more letters, digits, - and _; delete it for a "
            "new one"
        )
    return key
