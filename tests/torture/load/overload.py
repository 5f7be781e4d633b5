"""Ten times what a server can do, by an open loop: what it takes in is answered rightly and in time, the rest refused.

Two policies, as ``docs/serving.md`` describes them: a limit of the queue's length, and a limit of the time in it.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from serve.measure.open_loop import poisson_arrivals
from serve.models.config import ModelSettings
from serve.segment.connection import Connection
from serve.segment.errors import RULES, Action, ServerError
from serve.segment.slot import Slot
from serve.server.process import TritonServer
from tests.torture.load.server import LIMIT_S, SIDE, ask, is_right, loaded_server, memory_mib, tiles

LAYERS = 3
TIMES = 10
# A shorter measurement is halved by one sleep of the batcher, and ten times its result is then no overload.
CAPACITY_S = 2.0
BATCH = 4
TIMEOUT_S = 1.0
POLICIES = {
    "at most 32 requests wait": ModelSettings(max_batch_size=BATCH, max_queue_size=32),
    # So long that the time in it is what counts.
    "a request waits at most 1 s": ModelSettings(
        max_batch_size=BATCH, max_queue_size=4096, default_timeout_us=int(TIMEOUT_S * 1e6)
    ),
}
REFUSALS = {rule.words for rule in RULES if rule.action is Action.WAIT}
_WAITING = re.compile(r'^nv_inference_pending_request_count\{model="unet".*?\} (\d+)', re.MULTILINE)
_TILES = tiles(64)
# What Triton's batcher sleeps if no instance is idle when a request comes, see docs/serving.md.
_SLEEP_S = 0.5


@dataclass
class Overloaded:
    """What came of one policy.

    Attributes:
        policy: in words.
        capacity_per_s: answers a second to as many clients as fill the passes.
        sent: requests, at ten times that rate.
        refused: by the words of the table in ``serve/segment/errors.py``.
        latencies_s: of the requests that were answered, from their sending.
        span_s: from the first request to the last answer.
        most_waiting: requests in the server's queue, by its own metrics.
        memory_mib: of the server, before and after.
        recovery_s: from the last request to an empty queue and a right answer.
        faults: what is wrong.
        late: what took longer than the policy allows; a machine that stands still does that too.
    """

    policy: str
    capacity_per_s: float = 0.0
    sent: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    span_s: float = 0.0
    most_waiting: int = 0
    memory_mib: tuple[float, float] = (0.0, 0.0)
    recovery_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)

    def row(self) -> str:
        """A row of the table."""
        latencies = [f"{np.percentile(self.latencies_s, share):.2f}" for share in (50, 99, 100)]
        memory = " to ".join(f"{one:.0f}" for one in self.memory_mib)
        cells = (
            *(self.policy, f"{self.capacity_per_s:.0f}", f"{self.sent:,}", f"{len(self.latencies_s):,}"),
            *(f"{self.refused.total():,}", str(self.most_waiting), *latencies, f"{self.allowed_s:.2f}", memory),
            *(f"{self.recovery_s:.1f}", str(len(self.faults) + len(self.late))),
        )
        return f"| {' | '.join(cells)} |"

    @property
    def allowed_s(self) -> float:
        """What 99 of 100 answers may take: what the queue allows, twice the rest, at the rate of the answers."""
        settings, rate = POLICIES[self.policy], len(self.latencies_s) / self.span_s
        # Passes under way, and those that are prepared for the instances.
        ahead = 2 * settings.max_batch_size * settings.instance_count
        if settings.default_timeout_us:
            return settings.default_timeout_us * 1e-6 + _SLEEP_S + 2 * ahead / rate
        return _SLEEP_S + 2 * (settings.max_queue_size + ahead) / rate


HEAD = (
    "| policy | capacity, answers/s | sent | answered rightly | refused | most waiting | p50 s | p99 s | longest s | "
    "p99 allowed s | memory MiB | recovery s | faults |\n|---|" + "---:|" * 12
)


def attack(seconds: float, policy: str, *, note: Callable[[str], None] = lambda text: None) -> Overloaded:
    """Send ten times what the server can do for so long, and see what becomes of it.

    Args:
        seconds: how long.
        policy: one of ``POLICIES``.
        note: takes a line now and then.
    """
    found = Overloaded(policy)
    with loaded_server(LAYERS, POLICIES[policy]) as server:
        connection = Connection(server.settings.grpc_url, "unet", "", LIMIT_S)
        try:
            found.capacity_per_s = _capacity(server, CAPACITY_S)
            note(f"{policy}: the server answers {found.capacity_per_s:.1f} requests a second")
            before = memory_mib(server)
            with _Waiting(server) as waiting:
                _Loop(connection, found, note).run(seconds)
            found.most_waiting = waiting.most
            found.memory_mib = (before, memory_mib(server))
        finally:
            connection.close()
    _judge(found, seconds)
    note(found.row())
    return found


def _judge(found: Overloaded, seconds: float) -> None:
    answered, settings = len(found.latencies_s), POLICIES[found.policy]
    if found.most_waiting > settings.max_queue_size:
        found.faults.append(f"{found.most_waiting} requests waited, {settings.max_queue_size} may")
    if not found.refused or not answered:
        found.faults.append(f"{answered} answers and {found.refused.total()} refusals")
        return
    if (p99 := float(np.percentile(found.latencies_s, 99))) > found.allowed_s:
        found.late.append(f"{found.policy}: p99 is {p99:.2f} s, {found.allowed_s:.2f} s are allowed")
    if answered < 0.5 * found.capacity_per_s * seconds:
        found.late.append(f"{found.policy}: {answered} answers in {seconds:.0f} s")


def _capacity(server: TritonServer, seconds: float) -> float:
    """Answers a second to as many clients as fill the passes, measured for so long."""
    counts, until = [0] * 2 * BATCH, time.monotonic() + seconds

    def client(number: int) -> None:
        connection = Connection(server.settings.grpc_url, "unet", "", LIMIT_S)
        slot = Slot(connection, (1, 1, SIDE, SIDE))
        while time.monotonic() < until:
            with contextlib.suppress(ServerError):  # one that waited too long
                ask(connection, slot, _TILES[number])
                counts[number] += 1
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(len(counts))]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.monotonic() - started)


class _Waiting:
    """Asks the server again and again how many requests wait, and keeps the most.

    Triton counts a request as waiting before it looks whether the queue is full, so that one which is just being
    refused is counted too. It is gone the next time: of a few answers in a row the smallest counts.
    """

    def __init__(self, server: TritonServer) -> None:
        self._url = f"http://{server.settings.address}:{server.settings.metrics_port}/metrics"
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.most = 0

    def _run(self) -> None:
        while not self._enough.wait(0.05):
            self.most = max(self.most, min(self._count() for _ in range(3)))

    def _count(self) -> int:
        with urllib.request.urlopen(self._url, timeout=LIMIT_S) as answer:
            found = _WAITING.search(answer.read().decode())
        return int(found[1]) if found else 0

    def __enter__(self) -> _Waiting:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._enough.set()
        self._thread.join()


class _Loop:
    """Sends at random moments, whether or not answers come."""

    def __init__(self, connection: Connection, found: Overloaded, note: Callable[[str], None]) -> None:
        self._connection, self._found, self._note = connection, found, note
        self._in_flight, self._changed = 0, threading.Condition()

    def run(self, seconds: float) -> None:
        """For so long, and until all is answered and the server is its old self."""
        rate = TIMES * self._found.capacity_per_s
        arrivals = poisson_arrivals(rate, max(1, int(rate * seconds)))
        started = said = time.monotonic()
        for number, arrival in enumerate(arrivals):
            if (wait_s := started + arrival - time.monotonic()) > 0:
                time.sleep(wait_s)  # until the moment that was drawn
            self._send(number % len(_TILES))
            if time.monotonic() - said > 10:
                said = time.monotonic()
                self._note(f"{number + 1:,} of {len(arrivals):,} requests sent, {self._in_flight} without an answer")
        ended = time.monotonic()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._in_flight, LIMIT_S):
                self._found.faults.append(f"{self._in_flight} requests got neither answer nor refusal")
        self._found.span_s = time.monotonic() - started
        self._recover(ended)

    def _send(self, number: int) -> None:
        grpc, tile = self._connection.grpc, _TILES[number]
        image = grpc.InferInput("image", list(tile.shape), "UINT8")
        image.set_data_from_numpy(tile)
        with self._changed:
            self._in_flight += 1
            self._found.sent += 1
        receive = partial(self._receive, tile, time.monotonic())
        self._connection.infer_async([image], [grpc.InferRequestedOutput("probability")], receive)

    def _receive(self, tile: Any, sent_at: float, result: Any, error: Exception | None) -> None:
        latency_s = time.monotonic() - sent_at
        with self._changed:
            self._in_flight -= 1
            if error is None and is_right(result.as_numpy("probability"), tile):
                self._found.latencies_s.append(latency_s)
            elif error is None:
                self._found.faults.append("a wrong answer")
            else:
                self._refused(error)
            self._changed.notify_all()

    def _refused(self, error: Exception) -> None:
        """Note a refusal; every other error is a fault."""
        found = next((words for words in REFUSALS if re.search(words, str(error), re.IGNORECASE)), None)
        if found is None or self._connection.explain(error).action is not Action.WAIT:
            self._found.faults.append(f"refused by {str(error)[:200]}")
        else:
            self._found.refused[found] += 1

    def _recover(self, since: float) -> None:
        """Until one more request is taken and answered rightly."""
        slot = Slot(self._connection, (1, 1, SIDE, SIDE))
        while time.monotonic() - since < LIMIT_S:
            try:
                if not ask(self._connection, slot, _TILES[0]):
                    self._found.faults.append("a wrong answer after the load")
            except ServerError as error:
                if error.action is not Action.WAIT:
                    self._found.faults.append(f"after the load: {error}")
                    return
                time.sleep(0.05)  # refused: asked again
            else:
                self._found.recovery_s = time.monotonic() - since
                return
        self._found.faults.append(f"no answer within {LIMIT_S:g} s after the load")
