"""How a server runs, and the command line that says so to tritonserver."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.triton_install import Installation, TritonError

_IN_FLIGHT_TIMEOUT_S = 10
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
        address: that all of them listen on.
        start_timeout_s: longest wait for readiness.
        stop_timeout_s: longest wait for an orderly end, after which the server is killed.
    """

    repository: Path
    log: Path
    state_dir: Path
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    address: str = "127.0.0.1"
    start_timeout_s: float = 120.0
    stop_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name, port in self.ports.items():
            if not 1 <= port <= 65535:
                raise TritonError(f"{name} is {port}; ports go from 1 to 65535")
        if len(set(self.ports.values())) < len(self.ports):
            raise TritonError(f"the ports {', '.join(map(str, self.ports.values()))} must differ from each other")
        for name in ("start_timeout_s", "stop_timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TritonError(f"{name} is {getattr(self, name):g}; it must be positive")

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
        return f"{self.address}:{self.http_port}"


def server_command(settings: ServerSettings, installation: Installation, shm_prefix: str) -> list[str]:
    """The command line of tritonserver."""
    flags: dict[str, object] = {
        "model-repository": settings.repository.resolve(),
        "backend-directory": installation.backends,
        "cache-directory": installation.caches,
        "backend-config": f"python,shm-region-prefix-name={shm_prefix}",
        # Safe by default: nobody can load models over the network, nothing listens beyond `address`.
        "model-control-mode": "none",
        "http-address": settings.address,
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
    }
    if not _NVIDIA_DRIVER.exists():
        flags |= {"allow-gpu-metrics": "false", "pinned-memory-pool-byte-size": 0}
    # Configurations are written whole by `serve.repository`: completing them would start every model twice.
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [str(installation.server), *words, "--disable-auto-complete-config"]
