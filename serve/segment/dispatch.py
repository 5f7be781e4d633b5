"""Requests on their way to a server: several at a time, sent again where that is safe, to another server if need be.

A request has no effect on the server but its answer, so any that got none may be sent again. A full queue holds the
client back, a server that went away is waited for or replaced by the next address, and what a server refuses for
another reason is an error at once.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from serve.segment.connection import (
    ClientError,
    Connection,
    DeadlineError,
    Interface,
    MemoryForgottenError,
    NotServedError,
    ServerBusyError,
    ServerGoneError,
    Tls,
)
from serve.segment.slots import Shape, Slot, make_slots, slot_for
from unet.processes import signals_held_back

_FINISH_TIMEOUT_S = 2.0
_CANCEL_TIMEOUT_S = 2.0
_LONGEST_BACK_OFF_S = 2.0
_CONNECT_TIMEOUT_S = 5.0
# A full queue is no fault, but one that takes nothing for so many deadlines is.
_BUSY_DEADLINES = 10


@dataclass(frozen=True)
class Settings:
    """How requests are sent.

    Attributes:
        urls: the servers' gRPC addresses, HOST:PORT; the first that answers is used, the others when it goes away.
        model_name: the model.
        model_version: its version; empty for the newest.
        timeout_s: longest wait for one answer.
        patience_s: how long a server that went away is waited for.
        shared_memory: "auto", "on", "off" or "cuda".
        in_flight: requests under way at a time.
        tls: for an encrypted connection; None for a plain one.
    """

    urls: tuple[str, ...]
    model_name: str
    model_version: str
    timeout_s: float
    patience_s: float
    shared_memory: str
    in_flight: int
    tls: Tls | None = None


@dataclass
class Batch:
    """The tiles of one request, until they are answered.

    Attributes:
        count: of tiles.
        fill: puts them into uint8 [count, 1, S, S].
        accept: takes float16 [count, 1, S - 184, S - 184]; called from a connection's thread, once.
        wanted: whether anybody still waits for it.
        answered: whether ``accept`` was called.
    """

    count: int
    fill: Callable[[npt.NDArray[np.uint8]], None]
    accept: Callable[[npt.NDArray[np.float16]], None]
    wanted: bool = True
    answered: bool = False


@dataclass
class _Trouble:
    """Since when nothing succeeded any more, and how often something was tried again."""

    since: float = field(default_factory=time.monotonic)
    attempts: int = 0

    def back_off_s(self) -> float:
        self.attempts += 1
        return float(min(_LONGEST_BACK_OFF_S, 0.02 * 2 ** min(self.attempts, 10)))

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.since


class Dispatcher:
    """Sends batches and sees to it that each is answered; for use from one thread.

    Attributes:
        interface: of the served model.
        connection: to the server that is used now.
        slots: room for the requests, all of one shape.
        resent: how many requests were sent once more.
    """

    def __init__(self, settings: Settings) -> None:
        """Connect to the first server that serves the model.

        Raises:
            ClientError: if none does.
        """
        self.settings = settings
        self.slots: list[Slot] = []
        self.resent = 0
        self._free: queue.SimpleQueue[Slot] = queue.SimpleQueue()  # its lock outlives a Ctrl-C
        self._changed = threading.Condition()
        self._under_way: dict[object, Any] = {}
        self._failed: deque[tuple[Batch, Exception, Connection]] = deque()
        self._trouble: _Trouble | None = None
        self._retired: list[Connection] = []
        self.connection, self.interface = self._first_that_serves()

    def _first_that_serves(self) -> tuple[Connection, Interface]:
        faults = []
        for url in self.settings.urls:
            try:
                return self._connect(url, self.settings.timeout_s)
            except ClientError as error:
                faults.append(error)
        if len(faults) == 1:
            raise faults[0]
        listed = "; ".join(str(fault).split(":")[0] for fault in faults[:1] + faults[1:])
        raise ClientError(f"none of {', '.join(self.settings.urls)} serves {self.settings.model_name}: {listed}")

    def _connect(self, url: str, timeout_s: float) -> tuple[Connection, Interface]:
        settings = self.settings
        connection = Connection(url, settings.model_name, settings.model_version, settings.timeout_s, settings.tls)
        try:
            return connection, connection.interface(timeout_s)
        except BaseException:
            connection.close()
            raise

    def submit(self, batch: Batch, shape: Shape) -> None:
        """Send a batch as soon as there is room for it.

        Raises:
            ClientError: if an earlier request failed for good.
        """
        self._prepare(shape)
        self._send(batch, self._take_slot())

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Wait until ``done``, sending again what has failed meanwhile.

        Raises:
            ClientError: if a request failed for good.
        """
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda: bool(self._failed) or done(), self._patience_s):
                    raise self._silence()
                if not self._failed:
                    return
                batch, fault, connection = self._failed.popleft()
            if batch.wanted:
                try:
                    self._overcome(fault, connection)
                except ClientError:
                    self._trouble = None  # the next use begins with fresh patience
                    raise
                self.resent += 1
                self._send(batch, self._take_slot())

    def _overcome(self, fault: Exception, connection: Connection) -> None:
        """Wait, or connect anew, until it makes sense to send again.

        Raises:
            ClientError: if it does not.
        """
        if not isinstance(fault, connection.grpc.InferenceServerException):
            raise fault
        error = connection.explain(fault)
        with self._changed:
            trouble = self._trouble = self._trouble or _Trouble()
        if isinstance(error, ServerBusyError):
            if trouble.elapsed_s > _BUSY_DEADLINES * self.settings.timeout_s:
                raise error from fault
            self._pause(trouble.back_off_s())
        elif isinstance(error, MemoryForgottenError):
            # The slot is spent: the next one is made known to the server anew.
            if trouble.elapsed_s > self.settings.patience_s:
                raise error from fault
            trouble.attempts += 1
        # A server that stops in order unloads its models first.
        elif isinstance(error, (ServerGoneError, NotServedError)) or (
            isinstance(error, DeadlineError) and len(self.settings.urls) > 1
        ):
            self._reconnect(error, connection, trouble)
        else:
            raise error from fault

    def _reconnect(self, error: ClientError, connection: Connection, trouble: _Trouble) -> None:
        """Connect to the next server that serves the same model, or to the same one once it is back."""
        if connection is not self.connection:
            return  # done already, for another request
        urls = self.settings.urls
        following = urls.index(connection.url) + 1
        if trouble.attempts:
            self._pause(trouble.back_off_s())
        while True:
            for url in (*urls[following:], *urls[:following]):
                if trouble.elapsed_s > self.settings.patience_s:
                    raise error
                try:
                    fresh, interface = self._connect(url, min(self.settings.timeout_s, _CONNECT_TIMEOUT_S))
                except ClientError as again:
                    error = again
                    continue
                if interface != self.interface:
                    fresh.close()
                    raise ClientError(
                        f"{url} serves another {self.settings.model_name} than {connection.url} did: publish one "
                        "version on all servers"
                    )
                self._retired.append(self.connection)
                self.connection = fresh
                trouble.attempts += 1
                return
            self._pause(trouble.back_off_s())

    def _pause(self, seconds: float) -> None:
        """Wait, unless an answer shows sooner that all is well again."""
        with self._changed:
            self._changed.wait_for(lambda: self._trouble is None, seconds)

    def _send(self, batch: Batch, slot: Slot) -> None:
        request, free, connection = object(), self._free, self.connection
        try:
            batch.fill(slot.images[: batch.count])
            inputs, outputs = slot.tensors(connection.grpc, batch.count)
        except BaseException:
            free.put(slot)
            raise

        def receive(result: Any, error: Exception | None) -> None:
            # Called from the connection's own thread, by these names.
            fault = error
            try:
                if error is None:
                    batch.accept(slot.outputs(result, batch.count))
            except Exception as wrong:
                fault = wrong
            # What the queue refused no engine is working on.
            refused = error is not None and isinstance(connection.explain(error), ServerBusyError)
            slot.spent = slot.spent or (fault is not None and not refused)
            with self._changed:
                if fault is None:
                    batch.answered, self._trouble = True, None
                else:
                    self._failed.append((batch, fault, connection))
                free.put(slot)
                self._under_way.pop(request, None)
                self._changed.notify_all()

        # Ctrl-C in the midst of this would leave gRPC with a call that is neither sent nor given up.
        with signals_held_back():
            self._under_way[request] = None
            try:
                call = connection.infer_async(inputs, outputs, receive)
            except ClientError:
                self._under_way.pop(request)
                free.put(slot)
                raise
            with self._changed:
                if request in self._under_way:
                    self._under_way[request] = call

    def make_slots(self, count: int, shape: Shape) -> list[Slot]:
        """Room for ``count`` requests of a shape, in shared memory where it may be."""
        chosen = self.settings.shared_memory
        kind = slot_for(self.connection.url, chosen)
        return make_slots(self.connection, count, shape, kind, insist=chosen != "auto")

    def _prepare(self, shape: Shape) -> None:
        """Make the slots that requests of this shape travel in."""
        if self.slots and self.slots[0].shape == shape:
            return
        if self.slots:
            self.wait_for(lambda: not self._under_way)
        self._drop_slots()
        self.slots = self.make_slots(self.settings.in_flight, shape)
        for slot in self.slots:
            self._free.put(slot)

    @property
    def _patience_s(self) -> float:
        """Every request ends by its deadline; this is well beyond it."""
        return 2 * self.settings.timeout_s + 1

    def _take_slot(self) -> Slot:
        self.wait_for(lambda: not self._free.empty())
        slot = self._free.get_nowait()
        if not slot.spent and slot.connection is self.connection:
            return slot
        # Its place is taken by a new one.
        slot.close()
        try:
            fresh = self.make_slots(1, slot.shape)[0]
        except BaseException:
            slot.spent = True
            self._free.put(slot)
            raise
        self.slots[self.slots.index(slot)] = fresh
        return fresh

    def _silence(self) -> ClientError:
        return DeadlineError(f"{self.connection.url} has not answered for {self._patience_s:g} s: see its log")

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
            self._failed.clear()
        for slot in self.slots:
            slot.close()
        self.slots = []
        self._free = queue.SimpleQueue()

    def close(self) -> None:
        """Give up what is under way, have the server forget the shared memory, and hang up."""
        with signals_held_back():
            self._drop_slots()
            for connection in (*self._retired, self.connection):
                connection.close()


def addresses(url: str | Sequence[str]) -> tuple[str, ...]:
    """One or several addresses as a tuple without repetitions."""
    listed = (url,) if isinstance(url, str) else tuple(url)
    return tuple(dict.fromkeys(listed))
