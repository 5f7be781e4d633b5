"""What one request in flight needs: room for its tiles and its answer, in shared memory where the server takes it."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from unet.errors import UnetError
from unet.geometry import output_size

INPUT, OUTPUT = "image", "probability"

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "unet-client-"
_numbers = itertools.count()


class ClientError(UnetError):
    """A server, a model or an answer that cannot be used."""


def on_this_machine(url: str) -> bool:
    """Whether an address is this machine's own loopback, so that memory may be shared with what listens there."""
    host = url.rsplit(":", 1)[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def remove_dead_segments() -> None:
    """Remove shared memory of clients that were killed."""
    for segment in _SHARED_MEMORY.glob(f"{_PREFIX}*"):
        owner = segment.name[len(_PREFIX) :].split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            segment.unlink(missing_ok=True)


class Slot:
    """Room for one request, in this process's memory.

    Attributes:
        shape: of the largest batch of tiles, [N, 1, S, S].
        images: uint8 of that shape, to be filled before the request is sent.
        shared: whether the room is in shared memory.
    """

    shared = False

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape
        self.images: npt.NDArray[np.uint8] = np.empty(shape, np.uint8)

    def tensors(self, grpc: Any, count: int) -> tuple[list[Any], list[Any]]:
        """The request's inputs and outputs for the first ``count`` tiles."""
        image = grpc.InferInput(INPUT, [count, *self.shape[1:]], "UINT8")
        image.set_data_from_numpy(self.images[:count])
        return [image], [grpc.InferRequestedOutput(OUTPUT)]

    def outputs(self, answer: Any, count: int) -> npt.NDArray[np.float16]:
        """The answer's probabilities, float16 [count, 1, S - 184, S - 184], valid until the slot is used again."""
        result: npt.NDArray[np.float16] = answer.as_numpy(OUTPUT)
        return result

    def close(self) -> None:
        """Give the room back."""


class SharedSlot(Slot):
    """Room for one request in system shared memory, known to the server by name."""

    shared = True

    def __init__(self, client: Any, shape: tuple[int, int, int, int], timeout_s: float) -> None:
        with warnings.catch_warnings():
            # It still asks pkg_resources for its version.
            warnings.simplefilter("ignore", UserWarning)
            from tritonclient.utils import shared_memory

        self.shape = shape
        self._library, self._client, self._timeout_s = shared_memory, client, timeout_s
        side = output_size(shape[-1])
        self._answer_shape = (shape[0], 1, side, side)
        sizes = {"in": int(np.prod(shape)), "out": int(np.prod(self._answer_shape)) * 2}
        self._sizes = sizes
        number = next(_numbers)
        self._names = {way: f"{_PREFIX}{os.getpid()}-{number}-{way}" for way in sizes}
        self._regions: dict[str, Any] = {}
        try:
            for way, size in sizes.items():
                name = self._names[way]
                self._regions[way] = shared_memory.create_shared_memory_region(name, f"/{name}", size)
                client.register_system_shared_memory(name, f"/{name}", size, client_timeout=timeout_s)
        except BaseException:
            self.close()
            raise
        self.images = shared_memory.get_contents_as_numpy(self._regions["in"], np.uint8, list(shape))

    def tensors(self, grpc: Any, count: int) -> tuple[list[Any], list[Any]]:
        """The request's inputs and outputs: names of regions, no pixels."""
        image = grpc.InferInput(INPUT, [count, *self.shape[1:]], "UINT8")
        image.set_shared_memory(self._names["in"], count * self._sizes["in"] // self.shape[0])
        answer = grpc.InferRequestedOutput(OUTPUT)
        answer.set_shared_memory(self._names["out"], count * self._sizes["out"] // self.shape[0])
        return [image], [answer]

    def outputs(self, answer: Any, count: int) -> npt.NDArray[np.float16]:
        """The probabilities that the server wrote, a view."""
        shape = [count, *self._answer_shape[1:]]
        result: npt.NDArray[np.float16] = self._library.get_contents_as_numpy(self._regions["out"], np.float16, shape)
        return result

    def close(self) -> None:
        """Have the server forget the regions and remove them."""
        self.images = np.empty((0, 1, 0, 0), np.uint8)
        for way, region in self._regions.items():
            # The server may be gone already; the memory must go all the same.
            with contextlib.suppress(Exception):
                self._client.unregister_system_shared_memory(self._names[way], client_timeout=self._timeout_s)
            with contextlib.suppress(self._library.SharedMemoryException):
                self._library.destroy_shared_memory_region(region)
        self._regions = {}


def make_slots(
    client: Any, count: int, shape: tuple[int, int, int, int], *, shared: bool, insist: bool, timeout_s: float
) -> list[Slot]:
    """Room for ``count`` requests.

    Args:
        client: the gRPC connection.
        count: requests in flight.
        shape: of the largest batch of tiles, [N, 1, S, S].
        shared: whether to try shared memory.
        insist: whether to fail if the server does not take it, instead of sending the pixels.
        timeout_s: longest wait for the server to register it.

    Raises:
        ClientError: if shared memory is insisted on and cannot be had.
    """
    slots: list[Slot] = []
    if shared:
        remove_dead_segments()
        try:
            for _ in range(count):
                slots.append(SharedSlot(client, shape, timeout_s))
        except Exception as error:  # the library's, the server's and the system's own
            for slot in slots:
                slot.close()
            slots = []
            if insist:
                raise ClientError(
                    f"the server cannot share memory with this process ({error}): leave it off"
                ) from error
    return slots or [Slot(shape) for _ in range(count)]
