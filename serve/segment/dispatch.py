"""Requests on their way to servers: several at a time, sent again where that is safe, to another server if need be.

A request has no effect on a server but its answer, so any that got no usable one may be sent again. Each server has
room for some requests; a request takes the room that is free next, so that faster servers get more of them. What is
done about a fault stands in the table of ``errors``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.answer import probabilities
from serve.segment.connection import action_for
from serve.segment.errors import Action, ClientError, ServerError
from serve.segment.pool import Pool
from serve.segment.slots import close_all
from unet.processes import signals_held_back

if TYPE_CHECKING:
    from serve.segment.servers import Server
    from serve.segment.settings import Settings
    from serve.segment.slot import Shape, Slot

_FINISH_TIMEOUT_S = 2.0
_CANCEL_TIMEOUT_S = 2.0


@dataclass
class Batch:
    """The tiles of one request, until they are answered.

    Attributes:
        count: of tiles.
        fill: puts them into uint8 [count, 1, S, S].
        accept: takes float16 [count, 1, S - 184, S - 184]; called from a connection's thread, once.
        wanted: whether anybody still waits for it.
        sent: whether it was sent already.
        answered: whether ``accept`` was called.
    """

    count: int
    fill: Callable[[npt.NDArray[np.uint8]], None]
    accept: Callable[[npt.NDArray[np.float16]], None]
    wanted: bool = True
    sent: bool = False
    answered: bool = False


@dataclass(eq=False)
class _Request:
    """A batch under way."""

    batch: Batch
    server: Server
    slot: Slot
    sent_at: float = field(default_factory=time.monotonic)
    call: Any = None


class Dispatcher:
    """Sends batches and sees to it that each is answered; for use from one thread.

    Attributes:
        pool: the servers.
        resent: how many requests were sent once more.
    """

    def __init__(self, settings: Settings) -> None:
        """Connect to the first server that serves the model; the others follow with the first request.

        Raises:
            ClientError: if none does.
        """
        self.settings = settings
        self.resent = 0
        # Every request ends by its deadline; this is well beyond it.
        self._silence_s = 2 * settings.timeout_s + 1
        self._shape: Shape | None = None
        self._waiting: deque[Batch] = deque()
        # What connections' threads change too, under the condition.
        self._changed = threading.Condition()
        self._free: list[tuple[Server, Slot]] = []
        self._under_way: set[_Request] = set()
        self._failed: deque[tuple[_Request, Exception]] = deque()
        self._news = False
        self.pool = Pool(settings, self._changed)

    def submit(self, batch: Batch, shape: Shape) -> None:
        """Send a batch as soon as there is room for it.

        Raises:
            ClientError: if this or an earlier request failed for good.
        """
        self._prepare(shape)
        self._waiting.append(batch)
        self.wait_for(lambda: not self._waiting)

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until ``done``, sending again what has failed meanwhile.

        Raises:
            ClientError: if a request failed for good.
        """
        while True:
            self._tend()
            self._send_waiting()
            with self._changed:
                if not self._failed and done():
                    return
                pause_s = min(self.pool.pause_s(), self._silence_s)
                heard = self._changed.wait_for(lambda: self._news or self.pool.has_news or done(), pause_s)
                self._news = False
                failed, self._failed = self._failed, deque()
                silent = not heard and bool(self._under_way)
            for request, error in failed:
                self._judge(request, error)
            if silent:
                self._check_silence()

    def _check_silence(self) -> None:
        with self._changed:
            oldest = min((request.sent_at for request in self._under_way), default=time.monotonic())
        if time.monotonic() - oldest >= self._silence_s:
            said = f"no server has answered for {self._silence_s:g} s: see their logs"
            raise self.pool.for_good(ServerError(said, Action.LEAVE))

    def _judge(self, request: _Request, error: Exception) -> None:
        """Put a batch that failed back, and do about its server what the table says.

        Raises:
            ClientError: if it failed for good.
        """
        connection, server = request.slot.connection, request.server
        if not request.batch.wanted:
            return
        if isinstance(error, connection.grpc.InferenceServerException):
            error = connection.explain(error)
        if not isinstance(error, ServerError):
            raise error
        self._waiting.appendleft(request.batch)
        if connection is server.connection:  # else it was left meanwhile, for another request
            self.pool.act(server, error)

    def _tend(self) -> None:
        """Take over room that has come with connections, and give up what belonged to those that were left.

        Raises:
            ClientError: no server is left, and none has come back in time.
        """
        fresh = self.pool.tend(self._shape)
        with self._changed:
            self._free += fresh
            left = [each for each in self._under_way if each.slot.connection is not each.server.connection]
            stale = [(server, slot) for server, slot in self._free if slot.connection is not server.connection]
            if stale:
                self._free = [each for each in self._free if each not in stale]
        for server, slot in stale:
            server.stale.append(slot)
        for request in left:
            if request.call is not None:
                request.call.cancel()

    def _send_waiting(self) -> None:
        """Send what waits, as far as there is room."""
        while self._waiting:
            if not self._waiting[0].wanted:
                self._waiting.popleft()
                continue
            # Ctrl-C in the midst would lose a slot, or leave gRPC with a call that is neither sent nor given up.
            with signals_held_back():
                taken = self._take_slot()
                if taken is None:
                    return
                server, slot = taken
                try:
                    if slot.spent:
                        slot = self._replacement(server, slot)
                    self._send(_Request(self._waiting[0], server, slot))
                except ServerError as fault:
                    self.pool.act(server, fault)
                else:
                    self._waiting.popleft()

    def _take_slot(self) -> tuple[Server, Slot] | None:
        now = time.monotonic()
        with self._changed:
            for index, (server, slot) in enumerate(self._free):
                if slot.connection is server.connection and server.ready_at <= now:
                    return self._free.pop(index)
        return None

    def _replacement(self, server: Server, spent: Slot) -> Slot:
        """Another slot in the place of one that must not be used again."""
        try:
            spent.close()
            if spent.is_shared:  # the server is still at work on what was given up
                server.stale.append(spent)
            return server.make_slots(spent.connection, 1, spent.shape)[0]
        except BaseException:
            self._give_back(server, spent)
            raise

    def _give_back(self, server: Server, slot: Slot) -> None:
        with self._changed:
            self._free.append((server, slot))

    def _send(self, request: _Request) -> None:
        batch, server, slot = request.batch, request.server, request.slot
        connection = slot.connection
        try:
            batch.fill(slot.images[: batch.count])
            inputs, outputs = slot.tensors(connection.grpc, batch.count)
        except BaseException:
            self._give_back(server, slot)
            raise

        def receive(result: Any, error: Exception | None) -> None:
            # Called from the connection's own thread, by these names.
            fault = error
            try:
                if error is None:
                    batch.accept(probabilities(slot, result, batch.count))
            except Exception as wrong:
                fault = wrong
            # The server may still be writing an answer that came too late. What the queue refused no engine works on.
            slot.spent = slot.spent or (fault is not None and not (error and action_for(error) is Action.WAIT))
            with self._changed:
                if fault is None:
                    batch.answered, server.trouble = True, None
                else:
                    self._failed.append((request, fault))
                self._free.append((server, slot))
                self._under_way.discard(request)
                self._news = True
                self._changed.notify_all()

        self._under_way.add(request)
        try:
            request.call = connection.infer_async(inputs, outputs, receive)
        except ClientError:
            self._under_way.discard(request)
            self._give_back(server, slot)
            raise
        self.resent += batch.sent
        batch.sent = True

    def _prepare(self, shape: Shape) -> None:
        """Make the room that requests of this shape travel in."""
        if self._shape == shape:
            return
        self.wait_for(lambda: not self._under_way and not self._waiting)
        self._shape = None
        self._drop_slots()
        for server in self.pool.servers:
            if server.connection is None:
                continue
            try:
                slots = server.make_slots(server.connection, self.settings.in_flight, shape)
            except ServerError as fault:
                self.pool.act(server, fault)
            else:
                self._free.extend((server, slot) for slot in slots)
        self._shape = shape

    def _drop_slots(self) -> None:
        """Give back the room that no request is in."""
        with self._changed:
            free, self._free = self._free, []
        for server in self.pool.servers:
            if server.connection is not None:
                close_all(slot for owner, slot in free if owner is server and slot.connection is server.connection)
                server.forget_stale(server.connection)

    def _give_up_requests(self) -> None:
        """Await what is under way, though not for long, and cancel the rest.

        Something is under way only after an error or Ctrl-C. A server keeps memory that it is still writing to.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, _FINISH_TIMEOUT_S)
            calls = [request.call for request in self._under_way]
        for call in filter(None, calls):
            call.cancel()
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, _CANCEL_TIMEOUT_S)

    def close(self) -> None:
        """Give up what is under way, have the servers forget the shared memory, and hang up."""
        with signals_held_back():
            self._give_up_requests()
            self._drop_slots()
            self.pool.close()
