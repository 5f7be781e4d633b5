"""The servers that share the load: which of them are used just now, and what is done about their faults."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from serve.segment.errors import Action, ClientError, ServerError
from serve.segment.servers import CONNECT_TIMEOUT_S, Opened, Server
from serve.segment.slots import close_all

if TYPE_CHECKING:
    import threading

    from serve.segment.connection import Connection, Interface
    from serve.segment.settings import Settings
    from serve.segment.slot import Shape, Slot

LOGGER = logging.getLogger(__name__)

# A full queue is no fault, but one that takes nothing for so many deadlines is.
_BUSY_DEADLINES = 10


class Pool:
    """The servers; for use from one thread.

    Attributes:
        servers: all of them.
        interface: of the served model, the same on all servers that are used.
    """

    def __init__(self, settings: Settings, changed: threading.Condition) -> None:
        """Connect to the first server that serves the model; the others follow with ``tend``.

        Args:
            settings: how.
            changed: is notified when a connection is made, or cannot be.

        Raises:
            ClientError: if none does.
        """
        self._settings, self._changed = settings, changed
        self.servers = [Server(url, settings) for url in settings.urls]
        self._retired: list[Connection] = []
        self._said_busy = False
        self.interface = self._first_that_serves()

    def _first_that_serves(self) -> Interface:
        faults: list[ClientError] = []
        alone, timeout_s = len(self.servers) == 1, self._settings.timeout_s
        for server in self.servers:
            try:
                opened = server.open(None, None, timeout_s if alone else min(timeout_s, CONNECT_TIMEOUT_S))
            except ClientError as error:
                faults.append(error)
                server.fail(error)
            else:
                server.connection = opened.connection
                for fault in faults:
                    LOGGER.warning("%s; the other servers do the work", fault)
                return opened.interface
        raise faults[0] if alone else self._none_serves(faults)

    def act(self, server: Server, fault: ServerError) -> None:
        """Do about a fault what the table says.

        Raises:
            ClientError: nothing can be done about it.
        """
        alone = all(other is server or other.lost is not None for other in self.servers)
        action = fault.action
        if action is Action.WAIT:
            if server.fail(fault).elapsed_s <= _BUSY_DEADLINES * self._settings.timeout_s:
                self._say_busy(fault)
                return
            action = Action.LEAVE
        if action is Action.STOP or (action is Action.LEAVE and alone):
            raise self.for_good(fault) from fault
        if action is Action.LEAVE:
            server.leave(fault)
            LOGGER.warning("%s; the other servers go on", fault)
        else:
            server.send_pixels = server.send_pixels or action is Action.SEND_PIXELS
            if server.fail(fault, at_once=True).attempts == 1:
                LOGGER.warning("%s; connecting again", fault)
        self._disconnect(server)

    def _say_busy(self, fault: ServerError) -> None:
        if not self._said_busy:
            LOGGER.warning("%s; waiting for room", str(fault).split(": ")[0])
        self._said_busy = True

    def for_good(self, fault: ClientError) -> ClientError:
        """A fault that ends the use; the next one begins with fresh patience."""
        for server in self.servers:
            server.forgive()
        return fault

    def _disconnect(self, server: Server) -> None:
        if server.connection is not None:
            self._retired.append(server.connection)
            server.connection = None

    def tend(self, shape: Shape | None) -> list[tuple[Server, Slot]]:
        """Take over connections that were made, and begin to make those that are due.

        Args:
            shape: of the requests.

        Returns:
            The room for requests that has come with connections.

        Raises:
            ClientError: no server is left, and none has come back in time.
        """
        found = []
        for server in self.servers:
            outcome = server.take_outcome()
            if outcome is not None:
                found += [(server, slot) for slot in self._settle(server, outcome, shape)]
        for server in self.servers:
            if server.wants_to_be_opened and server.ready_at <= time.monotonic():
                server.begin_to_open(self.interface, shape, self._changed)
        if all(server.connection is None and server.is_hopeless for server in self.servers):
            faults = [fault for server in self.servers if (fault := server.fault) is not None]
            raise self.for_good(faults[0] if len(self.servers) == 1 else self._none_serves(faults))
        return found

    def _none_serves(self, faults: list[ClientError]) -> ServerError:
        listed = "; ".join(str(fault).split(": ")[0] for fault in faults)
        urls, name = ", ".join(self._settings.urls), self._settings.model_name
        return ServerError(f"none of {urls} serves {name}: {listed}", Action.REOPEN)

    def _settle(self, server: Server, outcome: Opened | Exception, shape: Shape | None) -> list[Slot]:
        if isinstance(outcome, Opened):
            if outcome.shape != shape:  # it changed meanwhile: once more
                close_all(outcome.slots)
                outcome.connection.close()
                return []
            server.connection = outcome.connection
            if server.trouble is not None:
                LOGGER.warning("%s answers again", server.url)
            return outcome.slots
        if isinstance(outcome, ServerError) and outcome.action is not Action.STOP:
            if server.fail(outcome).attempts == 1:
                LOGGER.warning("%s; the other servers do the work", outcome)
        elif isinstance(outcome, ClientError):
            server.lost = outcome
            if len(self.servers) > 1:
                LOGGER.warning("%s; the other servers go on", outcome)
        else:
            raise outcome
        return []

    @property
    def has_news(self) -> bool:
        """Whether ``tend`` has a connection to take over, or the news that there is none."""
        return any(server.has_outcome for server in self.servers)

    def pause_s(self) -> float:
        """Seconds until ``tend`` has something to do, or a server may be asked again; infinite if nothing is due."""
        now = time.monotonic()
        times = [float("inf")]
        for server in self.servers:
            if server.wants_to_be_opened or server.ready_at > now:
                times.append(server.ready_at - now)
            if server.trouble is not None and server.connection is None:
                # The end of its patience; a little later if it is still being connected to.
                times.append(max(0.05, self._settings.patience_s - server.trouble.elapsed_s))
        return max(0.0, min(times))

    def close(self) -> None:
        """Hang up."""
        for server in self.servers:
            server.hang_up()
            self._disconnect(server)
        for connection in self._retired:
            connection.close()
