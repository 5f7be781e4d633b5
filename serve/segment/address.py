"""Where a server listens, whether a proxy stands between, and the certificates of an encrypted connection."""

from __future__ import annotations

import http.client
import os
import re
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from serve.segment.errors import ClientError

_ENCRYPTED = ("grpcs", "https")
_SCHEMES = ("grpc", "http", *_ENCRYPTED)
# In gRPC's own order; it reads no others.
_PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
_NO_PROXY_VARIABLES = ("no_grpc_proxy", "no_proxy")
_PROBE_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Address:
    """One server.

    Attributes:
        host: its name or IP address; of IPv6 without brackets.
        port: of its gRPC.
        encrypted: whether the address itself asked for encryption, as https:// does.
    """

    host: str
    port: int
    encrypted: bool = False

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read HOST:PORT, with or without a scheme.

        Raises:
            ClientError: saying what is wrong with it.
        """
        scheme, separator, rest = text.strip().rpartition("://")
        if separator and scheme.lower() not in _SCHEMES:
            raise ClientError(f"the address {text} begins with {scheme}://: give HOST:PORT of the server's gRPC")
        found = re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:/\[\]\s]+))(?::(\d+))?/?", rest)
        if found is None:
            what = "is empty" if not rest else "is not HOST:PORT"
            raise ClientError(
                f"the address {text!r} {what}: give the server's name and the port of its gRPC, as in gpu1:8001 "
                "(IPv6 as in [::1]:8001)"
            )
        host, port = found[1] or found[2], found[3]
        if port is None or not 0 < int(port) < 2**16:
            raise ClientError(f"the address {text} has no valid port: add that of the server's gRPC, as in {host}:8001")
        return cls(host.lower(), int(port), scheme.lower() in _ENCRYPTED)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it is this machine's own loopback, so that memory may be shared with what listens there."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def is_local(self) -> bool:
        """Whether it is this machine, by whatever name: no proxy can be meant to stand between."""
        if self.is_loopback or self.host == socket.gethostname().lower():
            return True
        own = {address.address for each in psutil.net_if_addrs().values() for address in each}
        return self.host in own

    @property
    def proxy(self) -> str | None:
        """The proxy that gRPC goes through to this address, as "VARIABLE=VALUE"; None if it goes straight."""
        if self.is_local:
            return None
        excluded = next((os.environ[name] for name in _NO_PROXY_VARIABLES if os.environ.get(name)), "")
        if any(self.host.endswith(name.strip().lower()) for name in excluded.split(",") if name.strip()):
            return None
        names = (name for name in _PROXY_VARIABLES if os.environ.get(name))
        return next((f"{name}={os.environ[name]}" for name in names), None)

    def answers_http(self) -> bool:
        """Whether something that speaks HTTP, as Triton's other port does, listens there."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_PROBE_TIMEOUT_S)
        try:
            connection.request("GET", "/v2/health/live")
            return connection.getresponse().status > 0
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


@dataclass(frozen=True)
class Tls:
    """What an encrypted connection needs, as PEM files.

    Attributes:
        ca: the authority whose certificate the server must show.
        cert: this client's certificate, where the server asks for one.
        key: its private key.
    """

    ca: str | Path
    cert: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ClientError("a client's certificate and its key go together: give both --tls_cert and --tls_key")
        self._check_files()

    def _check_files(self) -> None:
        """Read them as gRPC will, which does not say which of them is at fault."""
        for path in (self.ca, self.cert, self.key):
            if path is None:
                continue
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise ClientError(f"{path} cannot be read: {error.strerror}") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise ClientError(
                f"{self.ca} holds no certificate of an authority in PEM ({_openssl_says(error)})"
            ) from error
        if self.cert is None or self.key is None:
            return
        try:
            # Without a password it would ask for one.
            context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError as error:
            raise ClientError(
                f"{self.cert} and {self.key} are no certificate and its unencrypted key in PEM ({_openssl_says(error)})"
            ) from error

    def options(self) -> dict[str, Any]:
        """For tritonclient's gRPC client.

        Raises:
            ClientError: if a file cannot be read here, as on a Dask worker, which gets this object unchecked.
        """
        self._check_files()
        names = {"root_certificates": self.ca, "certificate_chain": self.cert, "private_key": self.key}
        return {"ssl": True, **{name: str(path) for name, path in names.items() if path is not None}}


def _openssl_says(error: ssl.SSLError) -> str:
    return (error.reason or error.args[-1]).lower().replace("_", " ")
