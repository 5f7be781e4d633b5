"""How slices are sent to servers: the flags of the client and the arguments of a segmenter, defined once."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from serve.segment.address import Address
from serve.segment.errors import ClientError
from serve.segment.slots import SHARED_MEMORY
from unet.config import setting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.segment.address import Tls

DEFAULT_URL = "localhost:8001"


@dataclass(frozen=True)
class Settings:
    """How slices are sent.

    Attributes:
        urls: the servers' gRPC addresses, HOST:PORT, which share the load; each once.
        tls: certificates, for servers that encrypt; None for a plain connection.
        model_name: the model.
        model_version: its version; empty for the newest when the segmenter connects. It keeps to the one that it found.
        timeout_s: longest wait for one answer, in seconds.
        patience_s: how long servers that went away are waited for once none is left, in seconds.
        shared_memory: "auto" hands pixels over in shared memory where the server is on this machine and takes it; "on"
            insists, "off" sends them, "cuda" insists on memory of the GPU that both sides use.
        batch_size: tiles in one request, at most; of several slices where one has fewer.
        in_flight: requests under way at a time at each server.
        run_id: begins the id of every request, which the servers' logs and traces name; empty for one at random.
        tta: test-time augmentation: the mean of the answers to eight views of each tile, turned and mirrored; it takes
            eight times as long.
    """

    urls: tuple[str, ...] = (DEFAULT_URL,)
    tls: Tls | None = None
    model_name: str = setting("unet", "the served model")
    model_version: str = setting("", "its version; without one the newest, found at the start and kept to")
    timeout_s: float = setting(60.0, "longest wait for an answer, in seconds")
    patience_s: float = setting(30.0, "how long servers that went away are waited for once none is left, in seconds")
    shared_memory: str = setting("auto", "with a server on this machine", choices=tuple(SHARED_MEMORY))
    batch_size: int = setting(1, "tiles in one request, of several slices where one has fewer")
    in_flight: int = setting(4, "requests under way at a time, at each server")
    run_id: str = setting("", "begins each request's id in the servers' logs and traces; without one a random word")
    tta: bool = setting(False, "mean of eight turned and mirrored views; takes eight times as long")

    def __post_init__(self) -> None:
        if self.shared_memory not in SHARED_MEMORY:
            raise ClientError(f"shared_memory {self.shared_memory!r} is not one of {', '.join(SHARED_MEMORY)}")
        if (
            self.batch_size < 1
            or self.in_flight < 1
            or not 0 < self.timeout_s < float("inf")
            or not self.patience_s >= 0
        ):
            raise ClientError(
                "batch_size and in_flight must be at least 1, timeout_s positive, patience_s not negative"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.-]{0,64}", self.run_id):
            raise ClientError(f"--run_id {self.run_id!r} is not up to 64 letters, digits, dots, - and _")
        if not self.run_id:
            object.__setattr__(self, "run_id", f"unet-{secrets.token_hex(4)}")
        if not self.urls:
            raise ClientError("there is no server to connect to: name one with --url")

    @classmethod
    def of(cls, url: str | Sequence[str], options: dict[str, object]) -> Settings:
        """The settings for one or several addresses; the options are the other attributes by name.

        Raises:
            ClientError: an address or a value is none that can be used.
            TypeError: there is no such attribute.
        """
        unknown = sorted(set(options) - {field.name for field in fields(cls)} | ({"urls"} & set(options)))
        if unknown:
            raise TypeError(f"a segmenter takes no {', '.join(unknown)}")
        return cls(urls=addresses(url), **options)  # type: ignore[arg-type]


def addresses(url: str | Sequence[str]) -> tuple[str, ...]:
    """One or several addresses, each server once: two spellings of host and port are one server.

    Raises:
        ClientError: one is no address.
    """
    unique: dict[tuple[str, int], str] = {}
    for each in (url,) if isinstance(url, str) else url:
        address = Address.parse(each)
        unique.setdefault((address.host, address.port), each)
    return tuple(unique.values())
