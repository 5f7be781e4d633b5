"""Which kind of room requests travel in, made for several at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
from typing import TYPE_CHECKING

import psutil

from serve.segment.address import Address
from serve.segment.connection import unanswered
from serve.segment.cuda_slot import CudaMemoryError, CudaSlot
from serve.segment.errors import ClientError
from serve.segment.slot import PREFIX, SHARED_MEMORY_DIR, Shape, SharedSlot, Slot

if TYPE_CHECKING:
    from collections.abc import Iterable

    from serve.segment.connection import Connection

LOGGER = logging.getLogger(__name__)


def on_this_machine(url: str) -> bool:
    """Whether an address is this machine's own loopback, so that memory may be shared with what listens there."""
    return Address.parse(url).is_loopback


def remove_dead_segments() -> None:
    """Remove shared memory of clients that were killed in the moment when it had a name."""
    for segment in SHARED_MEMORY_DIR.glob(f"{PREFIX}*"):
        owner = segment.name[len(PREFIX) :].split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(PermissionError):  # another user's
                segment.unlink(missing_ok=True)


def close_all(slots: Iterable[Slot]) -> None:
    """Give rooms back; a server that does not answer is asked once, not about each of them."""
    answers = True
    for slot in slots:
        if answers:
            answers = slot.close()


# What may be asked for; None is left to the address.
SHARED_MEMORY: dict[str, type[Slot] | None] = {"auto": None, "on": SharedSlot, "off": Slot, "cuda": CudaSlot}


def slot_for(url: str, chosen: str) -> type[Slot]:
    """The kind of room for a server's requests.

    Args:
        url: the server's address; "auto" shares memory with this machine's own.
        chosen: one of `SHARED_MEMORY`.
    """
    return SHARED_MEMORY[chosen] or (SharedSlot if on_this_machine(url) else Slot)


def make_slots(connection: Connection, count: int, shape: Shape, kind: type[Slot], *, insist: bool) -> list[Slot]:
    """Room for ``count`` requests.

    Args:
        connection: to the server that is to know the room.
        count: requests in flight.
        shape: of the largest batch of tiles, [N, 1, S, S].
        kind: of room.
        insist: whether to fail if it cannot be had, instead of sending the pixels.

    Raises:
        ServerError: the server does not answer.
        ClientError: the room is insisted on and cannot be had.
    """
    remove_dead_segments()
    slots: list[Slot] = []
    try:
        for _ in range(count):
            slots.append(kind(connection, shape))
    except BaseException as error:
        close_all(slots)
        if not isinstance(error, (OSError, CudaMemoryError, connection.grpc.InferenceServerException)):
            raise
        if unanswered(error):
            raise connection.explain(error) from error
        if insist:
            raise ClientError(
                f"{connection.url} cannot share memory with this process ({error}): leave shared memory off"
            ) from error
        LOGGER.warning("no memory is shared with %s, the pixels are sent: %s", connection.url, _why(error))
        return [Slot(connection, shape) for _ in range(count)]
    return slots


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG):
        free = shutil.disk_usage(SHARED_MEMORY_DIR).free
        return f"{SHARED_MEMORY_DIR} has too little room ({free / 2**20:.0f} MiB free; docker's --shm-size enlarges it)"
    return str(error)
