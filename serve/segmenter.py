"""Slices through a served U-Net: tiles out, probabilities back, several requests in flight."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.slots import ClientError, Slot, make_slots, on_this_machine
from unet.geometry import TilePlan, cheapest_tile_size, is_valid_size, plan_tiles

if TYPE_CHECKING:
    from unet.geometry import Tile

INPUT, OUTPUT = "image", "probability"
# Their numbers in Triton's protocol, inference.DataType.
_UINT8, _FP16 = 2, 10
_CANCEL_TIMEOUT_S = 5.0
Send = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float16]]
SHARED_MEMORY = ("auto", "on", "off")


@dataclass
class _SliceInWork:
    """A slice whose tiles are under way."""

    image: npt.NDArray[np.uint8]
    plan: TilePlan
    probability: npt.NDArray[np.float32]
    missing: int
    done: threading.Event = field(default_factory=threading.Event)


class Segmenter:
    """A connection to one served model.

    Use it as a context manager, from one thread::

        with Segmenter() as segmenter:
            probability = segmenter.segment_slice(image)

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
            batch_size: tiles in one request.
            in_flight: requests under way at a time.

        Raises:
            ClientError: if no server answers, it does not serve the model, or the model has another interface.
        """
        import tritonclient.grpc as grpc

        if shared_memory not in SHARED_MEMORY:
            raise ClientError(f"shared_memory {shared_memory!r} is not one of {', '.join(SHARED_MEMORY)}")
        if batch_size < 1 or in_flight < 1 or timeout_s <= 0:
            raise ClientError("batch_size and in_flight must be at least 1, timeout_s positive")
        self.url, self.model_name, self.model_version = url, model_name, model_version
        self._timeout_s, self._in_flight, self._batch_size = timeout_s, in_flight, batch_size
        self._sharing = shared_memory
        self._grpc = grpc
        try:
            self._client = grpc.InferenceServerClient(url)
        except Exception as error:  # a malformed address fails in several ways
            raise ClientError(f"{url} is not HOST:PORT of a gRPC server: {error}") from error
        self._slots: list[Slot] = []
        self._free: queue.Queue[Slot] = queue.Queue()
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._under_way: dict[int, Any] = {}
        self._requests = itertools.count()
        try:
            self._read_interface()
        except BaseException:
            self.close()
            raise

    def _read_interface(self) -> None:
        config = self._call(self._client.get_model_config, self.model_name, self.model_version).config
        ports = [(p.name, p.data_type, list(p.dims)) for p in (*config.input, *config.output)]
        if [(name, kind) for name, kind, _ in ports] != [(INPUT, _UINT8), (OUTPUT, _FP16)]:
            raise ClientError(
                f"{self.model_name} on {self.url} is not a U-Net of this project: it must take UINT8 {INPUT!r} and "
                f"give FP16 {OUTPUT!r}; name another model with --model_name"
            )
        listed = config.parameters["tile_sizes"].string_value
        self.tile_sizes = tuple(int(size) for size in listed.split(",") if size.isdecimal())
        if not self.tile_sizes or not all(is_valid_size(size) for size in self.tile_sizes):
            raise ClientError(
                f"{self.model_name} on {self.url} names no usable tile size ({listed!r}): publish it again"
            )
        self.max_batch_size = max(1, int(config.max_batch_size))
        if self._batch_size > self.max_batch_size:
            raise ClientError(
                f"a batch of {self._batch_size} is more than the {self.max_batch_size} that {self.model_name} takes"
            )

    def _call(self, function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments, client_timeout=self._timeout_s)
        except self._grpc.InferenceServerException as error:
            raise self._explain(error) from error

    def _explain(self, error: Exception) -> ClientError:
        """One sentence for what went wrong with a call."""
        status = str(getattr(error, "status", lambda: "")() or "")
        message = str(getattr(error, "message", lambda: "")() or error)
        if "DEADLINE_EXCEEDED" in status:
            return ClientError(f"{self.url} gave no answer in {self._timeout_s:g} s: see its log, or raise --timeout_s")
        if "UNAVAILABLE" in status and "queue" in message:
            return ClientError(f"{self.url} has too many requests waiting ({message}): try again when it is less busy")
        if "UNAVAILABLE" in status:
            return ClientError(f"no server answers at {self.url}: start one with `make serve`, or name it with --url")
        if "NOT_FOUND" in status or "unknown model" in message.lower():
            return ClientError(f"{self.url} does not serve {self.model_name}: publish it, or name another --model_name")
        return ClientError(f"{self.url} refused: {message.splitlines()[0]}")

    def _prepare(self, tile_size: int) -> None:
        """Make the slots that requests of this size travel in."""
        shape = (self._batch_size, 1, tile_size, tile_size)
        if self._slots and self._slots[0].shape == shape:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, 2 * self._timeout_s)
        self._drop_slots()
        self._slots = self._make_slots(self._in_flight, shape)
        for slot in self._slots:
            self._free.put(slot)

    def _make_slots(self, count: int, shape: tuple[int, int, int, int]) -> list[Slot]:
        insist = self._sharing == "on"
        shared = insist or (self._sharing == "auto" and on_this_machine(self.url))
        return make_slots(self._client, count, shape, shared=shared, insist=insist, timeout_s=self._timeout_s)

    @property
    def uses_shared_memory(self) -> bool:
        """Whether pixels travel in shared memory; known once a slice was segmented."""
        return bool(self._slots) and self._slots[0].shared

    @contextlib.contextmanager
    def slot(self, shape: tuple[int, int, int, int]) -> Iterator[Send]:
        """A function that sends one batch of tiles of ``shape`` [N, 1, S, S] and waits for its answer.

        The function takes uint8 [N, 1, S, S] and gives float16 [N, 1, S - 184, S - 184], the probability of "not
        membrane", valid until the next call.

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        slots = self._make_slots(1, shape)
        try:
            yield lambda tiles: self._infer(slots[0], tiles)
        finally:
            slots[0].close()

    def _infer(self, slot: Slot, tiles: npt.NDArray[np.uint8]) -> npt.NDArray[np.float16]:
        slot.images[...] = tiles
        inputs, outputs = slot.tensors(self._grpc, len(tiles))
        try:
            answer = self._client.infer(
                self.model_name, inputs, self.model_version, outputs=outputs, client_timeout=self._timeout_s
            )
        except self._grpc.InferenceServerException as error:
            raise self._explain(error) from error
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
            while works and works[0].done.is_set():
                yield self._finished(works.popleft())
        while works:
            yield self._finished(works.popleft())

    def _submit_slice(self, image: npt.NDArray[np.uint8]) -> _SliceInWork:
        if image.dtype != np.uint8 or image.ndim != 2:
            raise ClientError(f"a slice must be uint8 [H, W], this is {image.dtype} {list(image.shape)}")
        height, width = image.shape
        tile_size = cheapest_tile_size(height, width, self.tile_sizes)
        self._prepare(tile_size)
        plan = plan_tiles(height, width, tile_size)
        work = _SliceInWork(image, plan, np.empty(image.shape, np.float32), len(plan))
        for first in range(0, len(plan), self._batch_size):
            self._submit_tiles(work, plan.tiles[first : first + self._batch_size])
        return work

    def _submit_tiles(self, work: _SliceInWork, tiles: tuple[Tile, ...]) -> None:
        slot, number = self._take_slot(), next(self._requests)
        for index, tile in enumerate(tiles):
            slot.images[index, 0] = work.plan.extract(work.image, tile)

        def receive(result: Any, error: Exception | None) -> None:
            # Called from the connection's own thread.
            try:
                if error is not None:
                    raise error
                outputs = slot.outputs(result, len(tiles))
                for output, tile in zip(outputs, tiles):
                    work.plan.place(output[0], tile, work.probability)
                with self._changed:
                    work.missing -= len(tiles)
                    finished = work.missing == 0
                if finished:
                    work.done.set()
            except Exception as fault:
                self._failure = fault
                work.done.set()
            finally:
                self._free.put(slot)
                with self._changed:
                    self._under_way.pop(number, None)
                    self._changed.notify_all()

        inputs, outputs = slot.tensors(self._grpc, len(tiles))
        self._under_way[number] = None
        try:
            call = self._client.async_infer(
                self.model_name,
                inputs,
                receive,
                self.model_version,
                outputs=outputs,
                client_timeout=self._timeout_s,
            )
        except self._grpc.InferenceServerException as error:
            self._under_way.pop(number)
            raise self._explain(error) from error
        with self._changed:
            if number in self._under_way:
                self._under_way[number] = call

    def _take_slot(self) -> Slot:
        self._raise_failure()
        try:
            # Every request ends by its deadline, so a slot comes free soon after it at the latest.
            slot = self._free.get(timeout=2 * self._timeout_s)
        except queue.Empty:
            raise ClientError(f"{self.url} has not answered for {2 * self._timeout_s:g} s: see its log") from None
        if self._failure is not None:
            self._free.put(slot)
        self._raise_failure()
        return slot

    def _finished(self, work: _SliceInWork) -> npt.NDArray[np.float32]:
        if not work.done.wait(2 * self._timeout_s):
            raise ClientError(f"{self.url} has not answered for {2 * self._timeout_s:g} s: see its log")
        self._raise_failure()
        return work.probability

    def _raise_failure(self) -> None:
        if isinstance(self._failure, self._grpc.InferenceServerException):
            raise self._explain(self._failure) from self._failure
        if self._failure is not None:
            raise self._failure

    def _drop_slots(self) -> None:
        """Give up what is under way, which is nothing unless an error or Ctrl-C got here first, and the slots."""
        with self._changed:
            for call in self._under_way.values():
                if call is not None:
                    call.cancel()
            self._changed.wait_for(lambda: not self._under_way, _CANCEL_TIMEOUT_S)
            self._under_way.clear()
        for slot in self._slots:
            slot.close()
        self._slots = []
        self._free = queue.Queue()

    def close(self) -> None:
        """Give up what is under way, remove the shared memory and hang up."""
        self._drop_slots()
        self._client.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
