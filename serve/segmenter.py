"""Slices through a served U-Net: tiles out, probabilities back, several requests in flight."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.connection import ClientError, Connection
from serve.slots import Shape, Slot, make_slots, on_this_machine
from unet.geometry import TilePlan, cheapest_tile_size, plan_tiles
from unet.processes import signals_held_back

if TYPE_CHECKING:
    from unet.geometry import Tile

_FINISH_TIMEOUT_S = 2.0
_CANCEL_TIMEOUT_S = 2.0
Send = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float16]]
SHARED_MEMORY = ("auto", "on", "off")


@dataclass
class _SliceInWork:
    """A slice whose tiles are under way; ``done`` when none is missing or one has failed."""

    image: npt.NDArray[np.uint8]
    plan: TilePlan
    probability: npt.NDArray[np.float32]
    missing: int
    failure: Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Segmenter:
    """A connection to one served model.

    Use it as a context manager, from one thread::

        with Segmenter() as segmenter:
            probability = segmenter.segment_slice(image)

    After an error it can be used again.

    Attributes:
        tile_sizes: the tile sizes that the served model takes.
        max_batch_size: most tiles in one request.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        model_name: str = "unet",
        model_version: str = "",
        *,
        timeout_s: float = 60.0,
        shared_memory: str = "auto",
        batch_size: int = 1,
        in_flight: int = 2,
    ) -> None:
        """Connect and ask for the model's interface.

        Args:
            url: host and port of the server's gRPC.
            model_name: the model.
            model_version: its version; empty for the newest.
            timeout_s: longest wait for one answer.
            shared_memory: "auto" hands pixels over in shared memory where the server is on this machine and takes it;
                "on" insists, "off" sends them.
            batch_size: tiles of one slice in one request, at most.
            in_flight: requests under way at a time.

        Raises:
            ClientError: if no server answers, it does not serve the model, or the model has another interface.
        """
        if shared_memory not in SHARED_MEMORY:
            raise ClientError(f"shared_memory {shared_memory!r} is not one of {', '.join(SHARED_MEMORY)}")
        if batch_size < 1 or in_flight < 1 or timeout_s <= 0:
            raise ClientError("batch_size and in_flight must be at least 1, timeout_s positive")
        self._in_flight, self._batch_size, self._sharing = in_flight, batch_size, shared_memory
        self._slots: list[Slot] = []
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._under_way: dict[object, Any] = {}
        self._connection = Connection(url, model_name, model_version, timeout_s)
        try:
            interface = self._connection.interface()
            self.tile_sizes, self.max_batch_size = interface.tile_sizes, interface.max_batch_size
            if batch_size > self.max_batch_size:
                raise ClientError(
                    f"a batch of {batch_size} is more than the {self.max_batch_size} that {model_name} takes"
                )
        except BaseException:
            self.close()
            raise

    @property
    def uses_shared_memory(self) -> bool:
        """Whether pixels travel in shared memory; known once a slice was segmented."""
        return bool(self._slots) and self._slots[0].shared

    @contextlib.contextmanager
    def slot(self, shape: Shape) -> Iterator[tuple[Send, bool]]:
        """A function that sends one batch of tiles of ``shape`` [N, 1, S, S] and waits; and whether memory is shared.

        The function takes uint8 [N, 1, S, S] and gives float16 [N, 1, S - 184, S - 184], the probability of "not
        membrane", valid until the next call.

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        slot = self._make_slots(1, shape)[0]
        try:
            yield lambda tiles: self._send(slot, tiles), slot.shared
        finally:
            slot.close()

    def _send(self, slot: Slot, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        if slot.spent:
            raise ClientError("a former request failed in this slot: open another")
        slot.images[...] = tiles
        try:
            answer = self._connection.infer(*slot.tensors(self._connection.grpc, len(tiles)))
        except BaseException:
            slot.spent = True
            raise
        return slot.outputs(answer, len(tiles))

    def segment_slice(self, image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """The probability of "not membrane" of one slice: uint8 [H, W] to float32 [H, W].

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        return next(self.segment([image]))

    def segment(self, slices: Iterable[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[np.float32]]:
        """The probabilities of several slices, in order; the next slices are under way while one is given out.

        Args:
            slices: uint8 [H, W] each; they are taken one by one, a few ahead.

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        works: deque[_SliceInWork] = deque()
        for image in slices:
            works.append(self._submit_slice(image))
            # One request that takes long must not let finished slices pile up behind it.
            while works and (works[0].done.is_set() or len(works) > self._in_flight):
                yield self._finished(works.popleft())
        while works:
            yield self._finished(works.popleft())

    def _submit_slice(self, image: npt.NDArray[np.uint8]) -> _SliceInWork:
        if image.dtype != np.uint8 or image.ndim != 2:
            raise ClientError(f"a slice must be uint8 [H, W], this is {image.dtype} {list(image.shape)}")
        height, width = image.shape
        tile_size = cheapest_tile_size(height, width, self.tile_sizes)
        self._prepare((self._batch_size, 1, tile_size, tile_size))
        plan = plan_tiles(height, width, tile_size)
        work = _SliceInWork(image, plan, np.empty(image.shape, np.float32), len(plan))
        for first in range(0, len(plan), self._batch_size):
            if work.failure is not None:
                break
            self._submit_tiles(work, plan.tiles[first : first + self._batch_size])
        return work

    def _submit_tiles(self, work: _SliceInWork, tiles: tuple[Tile, ...]) -> None:
        slot = self._take_slot()
        request, free = object(), self._free
        try:
            for index, tile in enumerate(tiles):
                slot.images[index, 0] = work.plan.extract(work.image, tile)
            inputs, outputs = slot.tensors(self._connection.grpc, len(tiles))
        except BaseException:
            self._free.put(slot)
            raise

        def receive(result: Any, error: Exception | None) -> None:
            # Called from the connection's own thread, by these names.
            try:
                if error is not None:
                    raise error
                for output, tile in zip(slot.outputs(result, len(tiles)), tiles):
                    work.plan.place(output[0], tile, work.probability)
            except Exception as fault:
                slot.spent = True
                work.failure = fault
            with self._changed:
                work.missing -= len(tiles)
                done = work.missing == 0 or work.failure is not None
                self._under_way.pop(request, None)
                self._changed.notify_all()
            # Not above: Ctrl-C can leave an event's inner lock taken, and `close` must still get at what is under way.
            free.put(slot)
            if done:
                work.done.set()

        # Ctrl-C in the midst of this would leave gRPC with a call that is neither sent nor given up.
        with signals_held_back():
            self._under_way[request] = None
            try:
                call = self._connection.infer_async(inputs, outputs, receive)
            except ClientError:
                self._under_way.pop(request)
                self._free.put(slot)
                raise
            with self._changed:
                if request in self._under_way:
                    self._under_way[request] = call

    def _make_slots(self, count: int, shape: Shape) -> list[Slot]:
        insist = self._sharing == "on"
        shared = insist or (self._sharing == "auto" and on_this_machine(self._connection.url))
        return make_slots(self._connection, count, shape, shared=shared, insist=insist)

    def _prepare(self, shape: Shape) -> None:
        """Make the slots that requests of this shape travel in."""
        if self._slots and self._slots[0].shape == shape:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, self._patience_s)
        self._drop_slots()
        self._slots = self._make_slots(self._in_flight, shape)
        for slot in self._slots:
            self._free.put(slot)

    @property
    def _patience_s(self) -> float:
        """Every request ends by its deadline; this is well beyond it."""
        return 2 * self._connection.timeout_s + 1

    def _take_slot(self) -> Slot:
        try:
            slot = self._free.get(timeout=self._patience_s)
        except queue.Empty:
            raise self._silence() from None
        if not slot.spent:
            return slot
        # Its place is taken by a new one.
        slot.close()
        try:
            fresh = self._make_slots(1, slot.shape)[0]
        except BaseException:
            self._free.put(slot)
            raise
        self._slots[self._slots.index(slot)] = fresh
        return fresh

    def _finished(self, work: _SliceInWork) -> npt.NDArray[np.float32]:
        # All its requests are on their way by now, whose deadlines have been running.
        if not work.done.wait(self._patience_s):
            raise self._silence()
        failure = work.failure
        if isinstance(failure, self._connection.grpc.InferenceServerException):
            raise self._connection.explain(failure) from failure
        if failure is not None:
            raise failure
        return work.probability

    def _silence(self) -> ClientError:
        return ClientError(f"{self._connection.url} has not answered for {self._patience_s:g} s: see its log")

    def _drop_slots(self) -> None:
        """Await what is under way, though not for long, and give up the rest and the slots.

        Something is under way only when an error or Ctrl-C got here first. A server does not forget memory that it is
        still writing to, so that a little patience leaves it cleaner than cancelling at once.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, _FINISH_TIMEOUT_S)
            calls = list(self._under_way.values())
        for call in filter(None, calls):
            call.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, _CANCEL_TIMEOUT_S)
            self._under_way.clear()
        for slot in self._slots:
            slot.close()
        self._slots = []
        self._free = queue.SimpleQueue()

    def close(self) -> None:
        """Give up what is under way, have the server forget the shared memory, and hang up."""
        with signals_held_back():
            self._drop_slots()
            self._connection.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
