"""An open loop: requests that arrive at random at a given rate, whether or not the server keeps up.

A closed loop waits for each answer before it sends the next request, so a slow answer makes it ask less, and the waits
that real clients would see are never measured. Here every latency counts from the moment at which the request was meant
to start, also where the sender was late.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.measure.common import LEAST_REQUESTS, MeasureError, percentiles
from serve.measure.levels import Load, counted, make_distinct
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    import numpy.typing as npt

    from serve.measure.perf_analyzer import PerfAnalyzer
    from serve.segment.connection import Connection

# If more requests than this are in flight, the server is far behind, and the rest is not sent.
MOST_IN_FLIGHT = 500
# The server keeps up if answers come at no less than this share of the rate of the arrivals.
_KEPT = 0.95

# Takes the keywords ``result`` and ``error``, one of them None, from any thread.
Receive = Callable[..., None]
# Sends one request without waiting for its answer, and calls the given function when that is there.
Send = Callable[[Receive], object]


@dataclass(frozen=True)
class OpenLoad:
    """The result of requests that arrived at random.

    Attributes:
        rate: arrivals a second that were asked for.
        arrived_per_s: arrivals a second of this draw; the fewer requests, the more it scatters around the rate.
        answered_per_s: answers over the time from the first arrival to the last answer.
        latencies_s: from the intended start to the answer, in seconds, one for each answer.
        failures: how many requests were refused or failed, by message.
        overloaded: whether the server fell so far behind that the rest was not sent.
    """

    rate: float
    arrived_per_s: float
    answered_per_s: float
    latencies_s: tuple[float, ...]
    failures: dict[str, int]
    overloaded: bool

    @property
    def kept(self) -> bool:
        """Whether the server kept up: nothing failed, and answers came as fast as requests."""
        return not self.overloaded and not self.failures and self.answered_per_s >= _KEPT * self.arrived_per_s

    @property
    def outcome(self) -> str:
        """Answers a second, and what went wrong if anything did."""
        failed = sum(self.failures.values())
        wrong = f", {failed} failed" if failed else "" if self.kept else ", not kept"
        return f"{self.answered_per_s:.1f}{wrong}"

    def percentile_ms(self, share: int) -> float | None:
        """A percentile of the latencies in milliseconds; None where there are too few requests for it."""
        return percentiles(self.latencies_s)[share] if self.latencies_s else None


def poisson_arrivals(rate: float, requests: int, seed: int = 0) -> npt.NDArray[np.float64]:
    """Seconds from the start at which so many requests arrive: a Poisson process, float64 [requests], rising."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))


class _Answers:
    """Collects answers from any thread."""

    def __init__(self, requests: int) -> None:
        self.ended_s = np.full(requests, np.nan)
        self.failures: Counter[str] = Counter()
        self.in_flight = 0
        self._changed = threading.Condition()
        self.started = time.perf_counter()

    def expect(self, index: int) -> Receive:
        """The function that receives the answer to one request."""
        with self._changed:
            self.in_flight += 1

        def receive(result: Any = None, error: Exception | None = None) -> None:
            now = time.perf_counter() - self.started
            with self._changed:
                if error is None:
                    self.ended_s[index] = now
                else:
                    self.failures[str(error)] += 1
                self.in_flight -= 1
                self._changed.notify_all()

        return receive

    def wait(self, timeout_s: float) -> bool:
        """Whether all answers came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.in_flight == 0, timeout_s)


def open_loop(send: Send, rate: float, requests: int, *, timeout_s: float, seed: int = 0) -> OpenLoad:
    """Send requests as they arrive at random and wait for all answers.

    Args:
        send: sends one request without waiting for its answer.
        rate: arrivals a second.
        requests: how many arrive.
        timeout_s: longest wait for the last answers after the last arrival.
        seed: of the arrivals.

    Raises:
        MeasureError: answers are still missing after that.
    """
    arrivals = poisson_arrivals(rate, requests, seed)
    answers, sent = _Answers(requests), 0
    for index, arrival in enumerate(arrivals):
        wait_s = arrival - (time.perf_counter() - answers.started)
        if wait_s > 0:
            time.sleep(wait_s)  # until the intended start: the clock itself is what is waited for
        if answers.in_flight >= MOST_IN_FLIGHT:
            break
        send(answers.expect(index))
        sent += 1
    if not answers.wait(timeout_s):
        raise MeasureError(
            f"{answers.in_flight} of {sent} answers at {rate:g} requests/s did not come within {timeout_s:g} s: "
            "lower the rate"
        )
    answered = ~np.isnan(answers.ended_s)
    latencies_s = (answers.ended_s - arrivals)[answered]
    span_s = float(answers.ended_s[answered].max() - arrivals[0]) if answered.any() else float("inf")
    return OpenLoad(
        rate,
        requests / float(arrivals[-1]),
        float(answered.sum()) / span_s,
        tuple(float(one) for one in latencies_s),
        dict(answers.failures),
        sent < requests,
    )


def open_load(connection: Connection, tile_size: int, rate: float, requests: int) -> OpenLoad:
    """Send single tiles to a server as they arrive at random, each with other pixels, and wait for all answers.

    Args:
        connection: to the served model; its timeout is the longest wait for an answer.
        tile_size: rows and columns of a tile.
        rate: arrivals a second.
        requests: how many arrive.

    Raises:
        ClientError: a request could not be sent.
        MeasureError: answers are missing, or every request failed.
    """
    image = Load(tile_size, 1).images()

    def send(receive: Receive) -> None:
        def explained(result: Any = None, error: Exception | None = None) -> None:
            receive(error=None if error is None else connection.explain(error))

        make_distinct(image)
        tensor = connection.grpc.InferInput(INPUT, list(image.shape), "UINT8")
        tensor.set_data_from_numpy(image)
        connection.infer_async([tensor], [connection.grpc.InferRequestedOutput(OUTPUT)], explained)

    found = open_loop(send, rate, requests, timeout_s=connection.timeout_s)
    if not found.latencies_s:
        raise MeasureError(f"every request failed: {next(iter(found.failures))}")
    return found


@dataclass(frozen=True)
class SecondOpinion:
    """What perf_analyzer measured at the same rate of random arrivals.

    Attributes:
        p50_ms: None where it did not measure.
        p99_ms: None where it did not measure, or too few requests.
        note: why a figure is missing or not to be relied on; empty if nothing is.
    """

    p50_ms: float | None = None
    p99_ms: float | None = None
    note: str = ""

    def __str__(self) -> str:
        cell = "-" if self.p99_ms is None else f"{self.p99_ms:.0f}"
        return f"{cell} ({self.note.splitlines()[0][:60]})" if self.note else cell


def second_opinion(
    analyzer: PerfAnalyzer, connection: Connection, tile_size: int, rate: float, requests: int
) -> SecondOpinion:
    """Let perf_analyzer send single tiles at random arrivals; if it fails, the note says why.

    Args:
        analyzer: the program.
        connection: to the served model.
        tile_size: rows and columns of a tile.
        rate: arrivals a second.
        requests: at least so many, in three windows.
    """
    try:
        with counted(connection.url, connection.model_name) as counts:
            row = analyzer.measure(
                *(connection.url, connection.model_name, 1, tile_size),
                requests=max(2, -(-requests // 3)),
                memory="none",
                rate=rate,
                timeout_s=connection.timeout_s,
            )
        cached = counts().cached
    except MeasureError as error:
        return SecondOpinion(note=str(error))
    if cached:
        return SecondOpinion(note="answered from the response cache")
    enough = row.requests >= LEAST_REQUESTS[99]
    notes = [] if row.stable else ["unstable"]
    notes += [] if enough else [f"{row.requests} requests are too few for p99"]
    return SecondOpinion(row.ms("p50 latency"), row.ms("p99 latency") if enough else None, ", ".join(notes))
