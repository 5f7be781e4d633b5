"""One of the servers that share the load: its connection, and whether it is used just now."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serve.segment.connection import Connection, Interface
from serve.segment.errors import ClientError
from serve.segment.slot import Slot
from serve.segment.slots import close_all, make_slots, slot_for

if TYPE_CHECKING:
    from serve.segment.settings import Settings
    from serve.segment.slot import Shape

# To connect again, or where others may answer.
CONNECT_TIMEOUT_S = 5.0
_SHORTEST_BACK_OFF_S, _LONGEST_BACK_OFF_S = 0.02, 2.0
_FIRST_LEAVE_S, _LONGEST_LEAVE_S = 10.0, 600.0
_HANG_UP_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Opened:
    """A connection that is ready for requests of one shape."""

    connection: Connection
    interface: Interface
    slots: list[Slot]
    shape: Shape | None


@dataclass
class Trouble:
    """Since when a server has given no answer, and how often something was tried."""

    fault: ClientError
    since: float = field(default_factory=time.monotonic)
    attempts: int = 0

    @property
    def back_off_s(self) -> float:
        """How long to wait before the next attempt, longer each time."""
        return min(_LONGEST_BACK_OFF_S, _SHORTEST_BACK_OFF_S * 2.0 ** min(self.attempts, 10))

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began; by a clock that nobody sets."""
        return time.monotonic() - self.since


class Server:
    """One server; its attributes change in the dispatcher's thread, but for ``trouble``, which an answer ends.

    Attributes:
        url: its address.
        connection: the one in use, or None while there is none.
        trouble: what it suffers from; None from its next answer on.
        lost: why it is not used any more at all, or None.
        ready_at: when it may be asked again, by ``time.monotonic``.
        send_pixels: whether no memory is shared any longer, since the server has too little.
        stale: room of former connections, which the server may still know.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self.url, self._settings = url, settings
        self.connection: Connection | None = None
        self.trouble: Trouble | None = None
        self.lost: ClientError | None = None
        self.ready_at = 0.0
        self.send_pixels = False
        self.stale: list[Slot] = []
        self._left = 0
        self._opening: threading.Thread | None = None
        self._tried: Connection | None = None
        self._outcome: Opened | Exception | None = None

    @property
    def wants_to_be_opened(self) -> bool:
        """Whether a connection is wanted, and none is being made."""
        return self.connection is None and self.lost is None and self._opening is None

    @property
    def fault(self) -> ClientError | None:
        """What it suffers from, or what made it useless."""
        return self.lost or (self.trouble.fault if self.trouble else None)

    def make_slots(self, connection: Connection, count: int, shape: Shape) -> list[Slot]:
        """Room for ``count`` requests of a shape, in shared memory where it may be.

        Raises:
            ClientError: if it cannot be had.
        """
        chosen = "off" if self.send_pixels else self._settings.shared_memory
        return make_slots(connection, count, shape, slot_for(connection.url, chosen), insist=chosen != "auto")

    def open(self, expected: Interface | None, shape: Shape | None, timeout_s: float) -> Opened:
        """Connect, and look at the model.

        Args:
            expected: the model that the server must serve; None takes whatever there is.
            shape: of the requests that room is made for; None makes none.
            timeout_s: longest wait for one answer.

        Raises:
            ServerError: the server does not answer, or does not serve the version just now.
            ClientError: it serves another model.
        """
        settings = self._settings
        version = settings.model_version if expected is None else expected.version
        connection = self._tried = Connection(self.url, settings.model_name, version, settings.timeout_s, settings.tls)
        connection.run_id = settings.run_id
        try:
            interface = connection.interface(timeout_s)
            if expected is not None and not interface.is_model_of(expected):
                raise ClientError(
                    f"{self.url} serves another {settings.model_name} version {version} than the run began with: "
                    "publish one version on all servers"
                )
            self.forget_stale(connection)
            slots = [] if shape is None else self.make_slots(connection, settings.in_flight, shape)
        except BaseException:
            connection.close()
            raise
        return Opened(connection, interface, slots, shape)

    def forget_stale(self, connection: Connection) -> None:
        """Have the server give up memory that it could not give up before: it hung, or was still at work in it."""
        stale, self.stale = self.stale, []
        for slot in stale:
            slot.connection = connection
        close_all(stale)

    def begin_to_open(self, expected: Interface, shape: Shape | None, changed: threading.Condition) -> None:
        """Connect in another thread, so that a server that hangs does not keep the others from their work."""

        def run() -> None:
            outcome: Opened | Exception
            try:
                outcome = self.open(expected, shape, min(self._settings.timeout_s, CONNECT_TIMEOUT_S))
            except Exception as error:
                outcome = error
            with changed:
                self._outcome = outcome
                changed.notify_all()

        self._opening = threading.Thread(target=run, daemon=True)
        self._opening.start()

    @property
    def has_outcome(self) -> bool:
        """Whether the connection that was begun is there, or has failed."""
        return self._outcome is not None

    def take_outcome(self) -> Opened | Exception | None:
        """The connection that was begun, or why there is none; None as long as it is being made."""
        outcome, self._outcome = self._outcome, None
        if outcome is not None:
            self._opening = None
        return outcome

    def fail(self, fault: ClientError, *, at_once: bool = False) -> Trouble:
        """Take note of a fault; the server may be asked again after a while, longer each time.

        Args:
            fault: what happened.
            at_once: whether the first attempt need not wait.
        """
        # An answer may take the trouble away at the same time, in another thread.
        trouble = self.trouble or Trouble(fault)
        trouble.fault = fault
        trouble.attempts += 1
        wait_s = 0.0 if at_once and trouble.attempts == 1 else trouble.back_off_s
        self.ready_at, self.trouble = time.monotonic() + wait_s, trouble
        return trouble

    def leave(self, fault: ClientError) -> None:
        """Take note of a fault that is likely to come again; the server is left alone for longer each time."""
        self.fail(fault)
        self.ready_at = time.monotonic() + min(_LONGEST_LEAVE_S, _FIRST_LEAVE_S * 4**self._left)
        self._left += 1

    def forgive(self) -> None:
        """Begin with fresh patience."""
        self.trouble, self.lost, self.ready_at = None, None, 0.0

    @property
    def is_hopeless(self) -> bool:
        """Whether it has been waited for long enough, without a connection."""
        if self.lost is not None or self.trouble is None:
            return self.lost is not None
        tried = self.trouble.attempts > 1 or self.ready_at > time.monotonic()
        return tried and self.trouble.elapsed_s > self._settings.patience_s

    def hang_up(self) -> None:
        """Give up the connection that is being made."""
        if self._opening is None:
            return
        if self._tried is not None:
            self._tried.close()
        self._opening.join(_HANG_UP_TIMEOUT_S)
        outcome = self.take_outcome()
        if isinstance(outcome, Opened):
            close_all(outcome.slots)
            outcome.connection.close()
