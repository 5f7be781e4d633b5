"""How many servers a load needs, simulated from measured service times: ``python serve/scaling.py``.

It reads what ``serve/benchmark.py`` measured on one server and simulates more of them behind one queue: requests arrive
at random (a Poisson process, an open loop), and a free server takes all that wait, up to its largest batch, as Triton's
dynamic batcher does without a delay. One queue is the best that a load balancer can do, so the counts are lower bounds.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from serve.measure.common import MeasureError
from unet.config import setting
from unet.geometry import output_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Shares of all requests at which the time of a batch is kept, and how finely it is drawn between them.
_SHARES = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)
_STEPS = 1000
# Closer to its capacity a queue does not settle in a time that can be simulated or that users wait.
MOST_BUSY = 0.9
# This share of the requests is simulated first and not counted, because the servers start idle.
_WARM_UP_SHARE = 0.2
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class ScalingSettings:
    """What is simulated from what, and whether one real server is measured beside it."""

    benchmark: Path = setting(
        Path("benchmark/benchmark.json"),
        "what was measured on one server; demo/benchmark/benchmark.json where there is none",
    )
    rates: tuple[float, ...] = setting((10.0, 30.0, 100.0, 300.0, 1000.0), "arrivals per second", kind=float)
    p99_ms: float = setting(1000.0, "99 of 100 answers must come within")
    terabytes: float = setting(1.0, "size of an 8-bit volume to segment at rest")
    shard_mpx: float = setting(64.0, "million pixels of a shard, as the client's --shard_mpx")
    client_mpx_per_s: float = setting(34.0, "million pixels that the client handles in a second of CPU time")
    price_per_hour: float = setting(0.0, "of one server, to price the volume; 0 for no price")
    url: str = setting("", "HOST:PORT of that server's gRPC, to measure it too at random arrivals")
    model_name: str = setting("unet", "the served model")
    shares: tuple[float, ...] = setting((0.5, 0.8), "of one server's capacity, the rates measured at --url", kind=float)
    requests: int = setting(1000, "that arrive at each of these rates; a 99th percentile needs 1,000")
    perf_analyzer: bool = setting(True, "measure at --url with NVIDIA's perf_analyzer too")
    out: Path = setting(Path("scaling.json"), "file for all figures")

    def __post_init__(self) -> None:
        if min((*self.rates, *self.shares)) <= 0 or min(self.p99_ms, self.terabytes, self.requests) <= 0:
            raise MeasureError("--rates, --shares, --requests, --p99_ms and --terabytes must be positive")
        if min(self.shard_mpx, self.client_mpx_per_s) <= 0:
            raise MeasureError("--shard_mpx and --client_mpx_per_s must be positive")


@dataclass(frozen=True)
class ServiceTimes:
    """How long one server takes for a batch, in seconds.

    Attributes:
        batch_sizes: measured sizes, rising.
        quantiles: for each size the times at the shares 0, 0.5, 0.9, 0.95, 0.99 and 1 of all requests.
    """

    batch_sizes: tuple[int, ...]
    quantiles: tuple[tuple[float, ...], ...]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, float | None]]) -> ServiceTimes:
        """From a benchmark's rows: the median, the slowest, and percentiles where there were requests enough.

        The faster half is taken to need the median; between what is known the time grows evenly.
        """
        if not rows:
            raise MeasureError("the benchmark has no row to go by: run serve/benchmark.py again, on an idle machine")
        measured = {int(row["batch_size"] or 1): _quantiles(row) for row in rows}
        sizes = tuple(sorted(measured))
        return cls(sizes, tuple(measured[size] for size in sizes))

    @property
    def max_batch_size(self) -> int:
        """The largest measured batch."""
        return self.batch_sizes[-1]

    @property
    def capacity(self) -> float:
        """Images a second of one server that always has its best batch."""
        table = self.table()
        means = table.mean(axis=1)
        return float(max((index + 1) / mean for index, mean in enumerate(means)))

    def table(self) -> npt.NDArray[np.float64]:
        """The times of batches of 1 to the largest, at evenly spaced shares; between measured sizes in proportion.

        Returns:
            float64 [largest batch, 1001], in seconds.
        """
        shares = np.linspace(0, 1, _STEPS + 1)
        drawn = np.array([np.interp(shares, _SHARES, quantiles) for quantiles in self.quantiles])
        sizes = range(1, self.max_batch_size + 1)
        columns = [np.interp(sizes, self.batch_sizes, drawn[:, share]) for share in range(_STEPS + 1)]
        return np.array(columns).T


def _quantiles(row: Mapping[str, float | None]) -> tuple[float, ...]:
    names = ("p50_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms")
    known = [(share, value / 1e3) for share, name in zip(_SHARES, names) if (value := row.get(name)) is not None]
    if not known:
        raise MeasureError("a row of the benchmark has no latencies: run serve/benchmark.py again")
    shares, seconds = [share for share, _ in known], [value for _, value in known]
    return tuple(float(np.interp(share, shares, seconds)) for share in _SHARES)


def simulate(
    times: ServiceTimes, rate: float, servers: int, requests: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """The latency of each of so many requests, waiting included, in seconds, float64 [requests].

    Args:
        times: of one server.
        rate: arrivals per second, each of one image.
        servers: behind one queue.
        requests: simulated arrivals.
        rng: of arrivals and service times.
    """
    arrivals: list[float] = np.cumsum(rng.exponential(1 / rate, requests)).tolist()
    shares: list[int] = rng.integers(0, _STEPS, requests, endpoint=True).tolist()
    table: list[list[float]] = times.table().tolist()
    ended = np.empty(requests)
    free_at = [0.0] * servers
    first, largest = 0, len(table)
    while first < requests:
        start = max(heapq.heappop(free_at), arrivals[first])
        waiting = bisect_right(arrivals, start, first, min(first + largest, requests)) - first
        batch = max(waiting, 1)
        done = start + table[batch - 1][shares[first]]
        ended[first : first + batch] = done
        heapq.heappush(free_at, done)
        first += batch
    latencies: npt.NDArray[np.float64] = ended - np.array(arrivals)
    return latencies


@dataclass(frozen=True)
class Need:
    """The fewest servers that bear a load.

    Attributes:
        rate: arrivals per second.
        servers: how many.
        p50_ms: median latency.
        p99_ms: 99th percentile of the latency, the median over the draws of arrivals.
        p99_worst_ms: in the worst of these draws, which the budget holds for.
        busy: the share of the servers' capacity that the load takes.
    """

    rate: float
    servers: int
    p50_ms: float
    p99_ms: float
    p99_worst_ms: float
    busy: float


def latency_of(times: ServiceTimes, rate: float, servers: int, *, requests: int = 20_000, seeds: int = 3) -> Need:
    """Simulate so many servers under a load, each draw of arrivals warmed up first.

    Args:
        times: of one server.
        rate: arrivals per second.
        servers: how many.
        requests: counted arrivals of each draw.
        seeds: draws.
    """
    warm_up = int(requests * _WARM_UP_SHARE)
    draws = []
    for seed in range(seeds):
        latencies = simulate(times, rate, servers, requests + warm_up, np.random.default_rng(seed))[warm_up:]
        draws.append(np.percentile(latencies, (50, 99)) * 1e3)
    p50, p99 = np.median(draws, axis=0)
    worst = float(np.max(draws, axis=0)[1])
    return Need(rate, servers, float(p50), float(p99), worst, rate / servers / times.capacity)


def servers_needed(
    times: ServiceTimes, rate: float, p99_s: float, *, most: int = 4096, requests: int = 20_000, seeds: int = 3
) -> Need:
    """The fewest servers that are less than 90 % busy and whose 99th percentile stays within a budget in every draw.

    Raises:
        MeasureError: if none do, up to ``most``: a request takes longer than the budget even without waiting.
    """

    def attempt(servers: int) -> Need:
        return latency_of(times, rate, servers, requests=requests, seeds=seeds)

    fewest = max(1, math.floor(rate / times.capacity / MOST_BUSY) + 1)
    high, low = fewest, fewest - 1
    found = attempt(high)
    while found.p99_worst_ms > p99_s * 1e3:
        if high >= most:
            raise MeasureError(
                f"no number of servers up to {most} answers 99 of 100 requests within {p99_s * 1e3:g} ms: one request "
                "alone takes that long; raise --p99_ms"
            )
        low, high = high, 2 * high
        found = attempt(high)
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(middle)
        if tried.p99_worst_ms <= p99_s * 1e3:
            high, found = middle, tried
        else:
            low = middle
    return found


def volume_hours(img_per_s: float, tile_size: int, volume_bytes: float) -> float:
    """Hours that one server takes for an 8-bit volume of so many bytes, at its best throughput."""
    return volume_bytes / output_size(tile_size) ** 2 / img_per_s / _SECONDS_PER_HOUR
