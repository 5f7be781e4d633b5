"""How a server runs, and the command line that says so to tritonserver."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from serve.server.install import Installation, TritonError

MODEL_CONTROL = ("none", "explicit")
# Header of the HTTP protocol; over gRPC it is called triton-grpc-protocol-admin-key.
ADMIN_KEY_HEADER = "admin-key"

_IN_FLIGHT_TIMEOUT_S = 10
_ADMIN_KEY_FILE = "admin.key"
_LEAST_KEY_LENGTH = 16
_ADMIN_PROTOCOLS = ("model-repository", "trace", "logging")
_SHARED_MEMORY_PROTOCOL = "shared-memory"
_OTHER_PROTOCOLS = ("metadata", "inference", "model-config", "statistics")
_NVIDIA_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class ServerSettings:
    """How a server runs.

    Attributes:
        repository: the model repository.
        log: file for what the server says; each server begins it anew.
        state_dir: folder for what the next command, or the next server, may use again.
        http_port: of the HTTP protocol, which also tells health.
        grpc_port: of the gRPC protocol.
        metrics_port: of Prometheus' metrics.
        address: that gRPC and the metrics listen on.
        http_address: that HTTP listens on. Clients speak gRPC, HTTP tells health, and the known holes of this Triton's
            HTTP are open to whoever reaches it: so it stays on this machine, whatever ``address`` is.
        start_timeout_s: longest wait for readiness.
        stop_timeout_s: longest wait for an orderly end, after which the server is killed.
        model_control: "none", or "explicit": models can be loaded and unloaded by whoever has the admin key.
        admin_key_file: file with that key; by default one in ``state_dir``, made when it is missing.
        tls_cert: PEM file with the server's certificate; gRPC is encrypted then, and HTTP tells health only.
        tls_key: PEM file with its private key.
        tls_client_ca: PEM file with the authority whose certificates clients must show.
        response_cache_mib: memory for answers that are kept; 0 keeps none.
    """

    repository: Path
    log: Path
    state_dir: Path
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    http_address: str = "127.0.0.1"
    start_timeout_s: float = 120.0
    stop_timeout_s: float = 30.0
    model_control: str = "none"
    admin_key_file: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    response_cache_mib: int = 0

    def __post_init__(self) -> None:
        for name, port in self.ports.items():
            if not 1 <= port <= 65535:
                raise TritonError(f"{name} is {port}; ports go from 1 to 65535")
        if len(set(self.ports.values())) < len(self.ports):
            raise TritonError(f"the ports {', '.join(map(str, self.ports.values()))} must differ from each other")
        for name in ("start_timeout_s", "stop_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TritonError(f"{name} is {getattr(self, name):g}; it must be positive")
        if self.model_control not in MODEL_CONTROL:
            raise TritonError(f"model_control is {self.model_control}; there are {' and '.join(MODEL_CONTROL)}")
        if self.response_cache_mib < 0:
            raise TritonError(f"response_cache_mib is {self.response_cache_mib}; it must be 0 or more")
        self._check_files()

    def _check_files(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None) or (self.tls_client_ca and not self.tls_cert):
            raise TritonError("tls_cert and tls_key go together, and tls_client_ca needs both")
        for path in (self.admin_key_file, self.tls_cert, self.tls_key, self.tls_client_ca):
            if path is not None and not os.access(path, os.R_OK):
                raise TritonError(f"{path} does not exist or cannot be read: name another file")

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches gRPC."""
        return _is_loopback(self.address)

    @property
    def ports(self) -> dict[str, int]:
        """The ports by the names of their settings."""
        return {"http_port": self.http_port, "grpc_port": self.grpc_port, "metrics_port": self.metrics_port}

    @property
    def grpc_url(self) -> str:
        """Where clients connect."""
        return f"{self.address}:{self.grpc_port}"

    @property
    def http_url(self) -> str:
        """Where clients of the HTTP protocol connect."""
        return f"{self.http_address}:{self.http_port}"


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def admin_key(settings: ServerSettings) -> tuple[Path, str]:
    """The file with the key to model control, made if it is missing, and the key.

    Raises:
        TritonError: the file's content is too short for a key, or has characters that a header cannot carry.
    """
    path = settings.admin_key_file or settings.state_dir / _ADMIN_KEY_FILE
    with contextlib.suppress(FileExistsError):
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
    return path, read_admin_key(path)


def read_admin_key(path: Path) -> str:
    """The key in a file.

    Raises:
        TritonError: it cannot be read or is none.
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


def server_command(
    settings: ServerSettings, installation: Installation, shm_prefix: str, models: list[str], key: str
) -> list[str]:
    """The command line of tritonserver.

    Args:
        settings: how it runs.
        installation: what runs.
        shm_prefix: of the names of its shared memory.
        models: what it serves.
        key: the admin key.
    """
    flags: dict[str, object] = {
        "model-repository": settings.repository.resolve(),
        "backend-directory": installation.backends,
        "cache-directory": installation.caches,
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        # Safe by default: nobody can load models over the network, nothing listens beyond `address`.
        "model-control-mode": settings.model_control,
        "http-address": settings.http_address,
        "http-port": settings.http_port,
        "grpc-address": settings.address,
        "grpc-port": settings.grpc_port,
        "metrics-address": settings.address,
        "metrics-port": settings.metrics_port,
        "allow-sagemaker": "false",
        "allow-vertex-ai": "false",
        "strict-readiness": "true",
        "exit-timeout-secs": _IN_FLIGHT_TIMEOUT_S,
        "log-format": "ISO8601",
        **_restrictions(settings, key),
        **_encryption(settings),
    }
    if settings.response_cache_mib:
        flags["cache-config"] = f"local,size={settings.response_cache_mib << 20}"
    if not _NVIDIA_DRIVER.exists():
        flags |= {"allow-gpu-metrics": "false", "pinned-memory-pool-byte-size": 0}
    words = [f"--{name}={value}" for name, value in flags.items()]
    if settings.model_control == "explicit":
        words += [f"--load-model={model}" for model in models]
    # Configurations are written whole by `serve.repository`: completing them would start every model twice.
    return [str(installation.server), *words, "--disable-auto-complete-config"]


def _restrictions(settings: ServerSettings, key: str) -> dict[str, object]:
    """What only the holder of the admin key may ask for.

    Shared memory is for clients on this machine; from elsewhere it is a way to the python backend's own memory. With
    TLS nothing that matters may go round it by HTTP, which Triton does not encrypt.
    """
    grpc, http = list(_ADMIN_PROTOCOLS), list(_ADMIN_PROTOCOLS)
    if not settings.is_local:
        grpc.append(_SHARED_MEMORY_PROTOCOL)
    if settings.tls_cert is not None:
        http += [_SHARED_MEMORY_PROTOCOL, *_OTHER_PROTOCOLS]
    elif not _is_loopback(settings.http_address):
        http.append(_SHARED_MEMORY_PROTOCOL)
    return {
        "grpc-restricted-protocol": f"{','.join(grpc)}:{ADMIN_KEY_HEADER}={key}",
        "http-restricted-api": f"{','.join(http)}:{ADMIN_KEY_HEADER}={key}",
    }


def _encryption(settings: ServerSettings) -> dict[str, object]:
    if settings.tls_cert is None or settings.tls_key is None:
        return {}
    flags: dict[str, object] = {
        "grpc-use-ssl": "true",
        "grpc-server-cert": settings.tls_cert.resolve(),
        "grpc-server-key": settings.tls_key.resolve(),
    }
    if settings.tls_client_ca is not None:
        flags |= {"grpc-use-ssl-mutual": "true", "grpc-root-cert": settings.tls_client_ca.resolve()}
    return flags
