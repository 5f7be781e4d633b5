"""The command line of tritonserver: safe by default, and different at each start."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve.models.library import arguments_library
from serve.server.addresses import for_http, in_url, is_loopback
from serve.server.regions import ADMIN_KEY_HEADER
from unet.tracing import traces_url

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.server.install import Installation
    from serve.server.settings import ServerSettings

_IN_FLIGHT_TIMEOUT_S = 10
_ADMIN_PROTOCOLS = ("model-repository", "trace", "logging")
_SHARED_MEMORY_PROTOCOL = "shared-memory"
_OTHER_PROTOCOLS = ("metadata", "inference", "model-config", "statistics")
_NVIDIA_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Identity:
    """What one start of a server has that no other has.

    Attributes:
        server_id: the name that the server gives when it is asked.
        shm_prefix: of the names of its shared memory.
        repository: where it finds the models: the repository, or a link to it.
        backends: where it finds the backends, likewise.
        links: folder of those links; empty if there are none.
    """

    server_id: str
    shm_prefix: str
    repository: Path
    backends: Path
    links: str = ""


@dataclass(frozen=True)
class KeyArgument:
    """The admin key on the command line, which all users of the machine can read.

    Attributes:
        text: what stands there: a placeholder, or the key itself where the library was not built.
        environment: of the server; the library that it names puts the key in the placeholder's place.
    """

    text: str
    environment: dict[str, str]

    @classmethod
    def of(cls, key_file: Path, key: str) -> KeyArgument:
        """For the key in a file.

        The placeholder is another one at each start: should the library not be loaded, it is no known key, and the
        server, which then refuses the true one, does not become ready.
        """
        library = arguments_library()
        if not library.is_file():
            return cls(key, {})
        placeholder = f"in-a-file-{secrets.token_urlsafe(24)}"
        preloaded = os.pathsep.join(filter(None, [str(library), os.environ.get("LD_PRELOAD")]))
        names = {"LD_PRELOAD": preloaded, "UNET_ARGUMENT_FILE": str(key_file.resolve())}
        return cls(placeholder, {**names, "UNET_ARGUMENT_PLACEHOLDER": placeholder})


def server_command(
    settings: ServerSettings, installation: Installation, identity: Identity, models: Sequence[str], key: str
) -> list[str]:
    """The command line of tritonserver.

    Args:
        settings: how it runs, its addresses resolved.
        installation: what runs.
        identity: of this start.
        models: what it serves.
        key: the admin key, or what stands for it.
    """
    flags: dict[str, object] = {
        "id": identity.server_id,
        "model-repository": identity.repository,
        "backend-directory": identity.backends,
        "cache-directory": installation.caches,
        "backend-config": f"python,shm-region-prefix-name={identity.shm_prefix}",
        # Safe by default: nobody can load models over the network, nothing listens beyond `address`.
        "model-control-mode": settings.model_control,
        "http-address": for_http(settings.http_address),
        "http-port": settings.http_port,
        "grpc-address": in_url(settings.address),
        "grpc-port": settings.grpc_port,
        "metrics-address": for_http(settings.address),
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
    words += [f"--trace-config={entry}" for entry in _tracing(settings)]
    if settings.model_control == "explicit":
        words += [f"--load-model={model}" for model in models]
    # Configurations are written whole by `serve.repository`: completing them would start every model twice.
    return [str(installation.server), *words, "--disable-auto-complete-config"]


def _restrictions(settings: ServerSettings, key: str) -> dict[str, object]:
    """What only the holder of the admin key may ask for.

    Shared memory is for clients on this machine; from elsewhere it is a way to the python backend's own memory. With
    TLS, HTTP, which Triton does not encrypt, must not be a way around it.
    """
    grpc, http = list(_ADMIN_PROTOCOLS), list(_ADMIN_PROTOCOLS)
    if not settings.is_local:
        grpc.append(_SHARED_MEMORY_PROTOCOL)
    if settings.tls_cert is not None:
        http += [_SHARED_MEMORY_PROTOCOL, *_OTHER_PROTOCOLS]
    elif not is_loopback(settings.http_address):
        http.append(_SHARED_MEMORY_PROTOCOL)
    return {
        "grpc-restricted-protocol": f"{','.join(grpc)}:{ADMIN_KEY_HEADER}={key}",
        "http-restricted-api": f"{','.join(http)}:{ADMIN_KEY_HEADER}={key}",
    }


def _tracing(settings: ServerSettings) -> list[str]:
    """Triton's own spans of every request: those that it says time it, within the trace that the client began."""
    if not settings.otlp:
        return []
    own = (f"url={traces_url(settings.otlp)}", "resource=service.name=triton")
    return ["mode=opentelemetry", "rate=1", "level=TIMESTAMPS", *(f"opentelemetry,{entry}" for entry in own)]


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
