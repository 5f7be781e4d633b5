"""What one request in flight needs: room for its tiles and its answer, in shared memory where the server takes it.

A region of shared memory has a name only from its creation until the server has mapped it, a few milliseconds: after
that both sides hold the memory itself, and the system takes it back when they end, however they end.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

from serve.segment.connection import ClientError, Connection
from unet.geometry import output_size
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Iterator

LOGGER = logging.getLogger(__name__)

Shape = tuple[int, int, int, int]

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "unet-client-"
_FORGET_TIMEOUT_S = 2.0
_DEVICE = 0


class CudaMemoryError(ClientError):
    """Memory of a GPU that cannot be had or used."""


def on_this_machine(url: str) -> bool:
    """Whether an address is this machine's own loopback, so that memory may be shared with what listens there."""
    host = url.rsplit(":", 1)[0].strip("[]")
    return host in ("localhost", "::1") or host.startswith("127.")


def remove_dead_segments() -> None:
    """Remove shared memory of clients that were killed in the moment when it had a name."""
    for segment in _SHARED_MEMORY.glob(f"{_PREFIX}*"):
        owner = segment.name[len(_PREFIX) :].split("-")[0]
        if owner.isdecimal() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(PermissionError):  # another user's
                segment.unlink(missing_ok=True)


class Slot:
    """Room for one request, in this process's memory.

    Attributes:
        connection: that requests in it are sent over.
        shape: of the largest batch of tiles, [N, 1, S, S].
        images: uint8 of that shape, to be filled before the request is sent.
        memory: where the room is, in perf_analyzer's words: "none" if pixels are sent, "system" or "cuda" if shared.
        spent: whether a request failed in it. The server may still be writing an answer that nobody waits for any
            longer, so the room must not be used again.
    """

    memory = "none"

    def __init__(self, connection: Connection, shape: Shape) -> None:
        self.connection, self.shape = connection, shape
        self.spent = False
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

    memory = "system"

    def __init__(self, connection: Connection, shape: Shape) -> None:
        """Make the room and have the server map it.

        Raises:
            OSError: if there is too little shared memory.
            tritonclient.utils.InferenceServerException: if the server does not take it.
        """
        self.connection, self.shape, self.spent = connection, shape, False
        side = output_size(shape[-1])
        self._answer_shape = (shape[0], 1, side, side)
        # Random, because processes of two containers may have one number.
        stem = f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._names = {INPUT: f"{stem}-in", OUTPUT: f"{stem}-out"}
        try:
            self.images = self._region(INPUT, int(np.prod(shape)), np.uint8).reshape(shape)
            answers = self._region(OUTPUT, int(np.prod(self._answer_shape)) * 2, np.float16)
        except BaseException:
            self.close()
            raise
        self._answers: npt.NDArray[np.float16] = answers.reshape(self._answer_shape)

    def _region(self, way: str, size: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Memory that the server has mapped too."""
        name = self._names[way]
        path = _SHARED_MEMORY / name
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
            try:
                # Without this a full /dev/shm would show at the first write: a bus error, here or in the server.
                os.posix_fallocate(descriptor, 0, size)
                memory = mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
            self.connection.client.register_system_shared_memory(
                name, f"/{name}", size, client_timeout=self.connection.timeout_s
            )
        finally:
            path.unlink(missing_ok=True)
        # The array keeps the memory: it goes with the last view of it.
        return np.frombuffer(memory, dtype)

    def tensors(self, grpc: Any, count: int) -> tuple[list[Any], list[Any]]:
        """The request's inputs and outputs: names of regions, no pixels."""
        image = grpc.InferInput(INPUT, [count, *self.shape[1:]], "UINT8")
        image.set_shared_memory(self._names[INPUT], self.images[:count].nbytes)
        answer = grpc.InferRequestedOutput(OUTPUT)
        answer.set_shared_memory(self._names[OUTPUT], self._answers[:count].nbytes)
        return [image], [answer]

    def outputs(self, answer: Any, count: int) -> npt.NDArray[np.float16]:
        """The probabilities that the server wrote, a view."""
        return self._answers[:count]

    def close(self) -> None:
        """Have the server forget the regions."""
        for name in self._names.values():
            # It may be gone, or still at work on a request that was given up: then it keeps them until it ends.
            with contextlib.suppress(Exception):
                self.connection.client.unregister_system_shared_memory(name, client_timeout=_FORGET_TIMEOUT_S)


class CudaSlot(Slot):
    """Room for one request in the memory of the first visible GPU, which server and client share.

    Tiles go to the GPU from here, and the answer is fetched from there: the server copies nothing.
    """

    memory = "cuda"

    def __init__(self, connection: Connection, shape: Shape) -> None:
        """Make the room and have the server map it.

        Raises:
            CudaMemoryError: there is no GPU, too little of its memory, or no cuda-python.
            tritonclient.utils.InferenceServerException: if the server does not take it.
        """
        super().__init__(connection, shape)
        self._cuda = _cuda_shared_memory()
        side = output_size(shape[-1])
        self._answer_shape = (shape[0], 1, side, side)
        stem = f"{_PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._names = {INPUT: f"{stem}-cuda-in", OUTPUT: f"{stem}-cuda-out"}
        self._regions: dict[str, Any] = {}
        try:
            self._register(INPUT, self.images.nbytes)
            self._register(OUTPUT, int(np.prod(self._answer_shape)) * 2)
        except BaseException:
            self.close()
            raise

    def _register(self, way: str, size: int) -> None:
        with self._errors():
            self._regions[way] = self._cuda.create_shared_memory_region(self._names[way], size, _DEVICE)
            handle = self._cuda.get_raw_handle(self._regions[way])
        self.connection.client.register_cuda_shared_memory(
            self._names[way], handle, _DEVICE, size, client_timeout=self.connection.timeout_s
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._cuda.CudaSharedMemoryException as error:
            raise CudaMemoryError(f"the GPU's memory cannot be used: {error}") from error

    def tensors(self, grpc: Any, count: int) -> tuple[list[Any], list[Any]]:
        """The request's inputs and outputs: names of regions, the tiles already on the GPU.

        Raises:
            CudaMemoryError: they cannot be brought there.
        """
        with self._errors():
            self._cuda.set_shared_memory_region(self._regions[INPUT], [self.images[:count]])
        image = grpc.InferInput(INPUT, [count, *self.shape[1:]], "UINT8")
        image.set_shared_memory(self._names[INPUT], self.images[:count].nbytes)
        answer = grpc.InferRequestedOutput(OUTPUT)
        answer.set_shared_memory(self._names[OUTPUT], count * int(np.prod(self._answer_shape[1:])) * 2)
        return [image], [answer]

    def outputs(self, answer: Any, count: int) -> npt.NDArray[np.float16]:
        """The probabilities that the server left on the GPU, fetched from there.

        Raises:
            CudaMemoryError: they cannot be.
        """
        with self._errors():
            whole = self._cuda.get_contents_as_numpy(self._regions[OUTPUT], np.float16, list(self._answer_shape))
        return np.asarray(whole[:count], np.float16)

    def close(self) -> None:
        """Have the server forget the regions, and give them back."""
        for way, region in self._regions.items():
            with contextlib.suppress(Exception):
                self.connection.client.unregister_cuda_shared_memory(self._names[way], client_timeout=_FORGET_TIMEOUT_S)
            with contextlib.suppress(self._cuda.CudaSharedMemoryException):
                self._cuda.destroy_shared_memory_region(region)
        self._regions = {}


def _cuda_shared_memory() -> Any:
    try:
        import tritonclient.utils.cuda_shared_memory as cuda
    except (ImportError, RuntimeError) as error:  # it makes the one of cuda-python into the other
        raise CudaMemoryError(
            "cuda-python cannot be loaded: on a machine with an NVIDIA GPU, pip install 'unet-medical-triton[gpu]'"
        ) from error
    return cuda


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
        ClientError: if the room is insisted on and cannot be had.
    """
    remove_dead_segments()
    slots: list[Slot] = []
    try:
        for _ in range(count):
            slots.append(kind(connection, shape))
    except BaseException as error:
        for slot in slots:
            slot.close()
        if not isinstance(error, (OSError, CudaMemoryError, connection.grpc.InferenceServerException)):
            raise
        if insist:
            raise ClientError(
                f"{connection.url} cannot share memory with this process ({error}): leave shared memory off"
            ) from error
        LOGGER.info("no shared memory with %s, the pixels are sent: %s", connection.url, error)
        return [Slot(connection, shape) for _ in range(count)]
    return slots
