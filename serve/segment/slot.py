"""What one request in flight needs: room for its tiles and its answer, in shared memory where the server takes it.

A region of shared memory has a name only from its creation until the server has mapped it, a few milliseconds: after
that both sides hold the memory itself, and the system takes it back when they end, however they end.
"""

from __future__ import annotations

import mmap
import os
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.connection import MESSAGE_BYTES, unanswered
from serve.segment.errors import ClientError
from unet.geometry import output_size
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from serve.segment.connection import Connection

Shape = tuple[int, int, int, int]

SHARED_MEMORY_DIR = Path("/dev/shm")
PREFIX = "unet-client-"
FORGET_TIMEOUT_S = 2.0
# Nothing but the next answer tells that a region is free.
_ASK_AGAIN_S = 0.002
_IN_USE = "currently in use"
# Room is left for what a message says beside the pixels.
_MOST_BYTES = MESSAGE_BYTES - 2**16
# Of what is no probability: an answer that was not written shows as such.
_UNWRITTEN = 0xFFFF


def region_stem() -> str:
    """Of the names of one slot's regions: random, because processes of two containers may have one number."""
    return f"{PREFIX}{os.getpid()}-{uuid.uuid4().hex[:12]}"


class Slot:
    """Room for one request, in this process's memory.

    Attributes:
        connection: that requests in it are sent over.
        shape: of the largest batch of tiles, [N, 1, S, S].
        images: uint8 of that shape, to be filled before the request is sent.
        memory: where the room is, in perf_analyzer's words: "none" if pixels are sent, "system" or "cuda" if shared.
        is_shared: whether a server has regions of it.
        spent: whether a request failed in it. The server may still be writing an answer that nobody waits for any
            longer, so the room must not be used again.
    """

    memory = "none"
    is_shared = False

    def __init__(self, connection: Connection, shape: Shape) -> None:
        """Make the room.

        Raises:
            ClientError: a request, or its answer, would be larger than a message of gRPC may be.
        """
        self.connection, self.shape = connection, shape
        self.spent = False
        largest = _largest_message(shape)
        if largest > _MOST_BYTES:
            fitting = _MOST_BYTES // (largest // shape[0])
            advice = f"lower the batch size to {fitting}" if fitting else "serve smaller tile sizes"
            raise ClientError(
                f"{shape[0]} tiles of {shape[-1]} x {shape[-1]} in one request take {largest / 2**30:.2f} GiB, more "
                f"than the 2 GiB of a message of gRPC: {advice} (--batch_size)"
            )
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

    def close(self) -> bool:
        """Give the room back; returns whether the server answered."""
        return True


class SharedSlot(Slot):
    """Room for one request in system shared memory, known to the server by name."""

    memory = "system"
    is_shared = True

    def __init__(self, connection: Connection, shape: Shape) -> None:
        """Make the room and have the server map it.

        Raises:
            OSError: if there is too little shared memory.
            tritonclient.utils.InferenceServerException: if the server does not take it.
        """
        self.connection, self.shape, self.spent = connection, shape, False
        side = output_size(shape[-1])
        self._answer_shape = (shape[0], 1, side, side)
        stem = region_stem()
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
        path = SHARED_MEMORY_DIR / name
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
        self._answers[:count].view(np.uint16).fill(_UNWRITTEN)
        answer = grpc.InferRequestedOutput(OUTPUT)
        answer.set_shared_memory(self._names[OUTPUT], self._answers[:count].nbytes)
        return [image], [answer]

    def outputs(self, answer: Any, count: int) -> npt.NDArray[np.float16]:
        """The probabilities that the server wrote, a view."""
        return self._answers[:count]

    def close(self) -> bool:
        """Have the server forget the regions; returns whether it answered."""
        client = self.connection.client
        forgotten, answers = forget(self._names.values(), client.unregister_system_shared_memory, wait=not self.spent)
        self.is_shared = not forgotten
        return answers


def forget(names: Iterable[str], unregister: Callable[..., None], *, wait: bool) -> tuple[bool, bool]:
    """Have a server forget regions.

    Args:
        names: of the regions.
        unregister: the client's call for this kind of memory.
        wait: for a request that is still in them. Triton lets go of a request a moment after it has answered it, and
            until then refuses to forget its memory; a request that was given up may take long.

    Returns:
        Whether it has forgotten all of them, and whether it answered.
    """
    until = time.monotonic() + FORGET_TIMEOUT_S
    forgotten = True
    for name in names:
        while True:
            try:
                unregister(name, client_timeout=FORGET_TIMEOUT_S)
            except Exception as error:
                if unanswered(error):
                    return False, False
                if wait and _IN_USE in str(error) and time.monotonic() < until:
                    time.sleep(_ASK_AGAIN_S)
                    continue
                forgotten = False
            break
    return forgotten, True


def _largest_message(shape: Shape) -> int:
    """Bytes of the pixels of a request or of its answer, whichever are more."""
    count, _, side, _ = shape
    return count * max(side**2, 2 * output_size(side) ** 2)
