"""How many servers a load needs, simulated from measured service times: ``python serve/scaling.py``.

It reads what ``serve/benchmark.py`` measured on one server and simulates more of them behind one queue: requests arrive
at random (a Poisson process), and a free server takes all that wait, up to its largest batch, as Triton's dynamic
batcher does without a delay. One queue is the best that a load balancer can do, so the counts are lower bounds.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError
from unet.geometry import output_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_QUANTILES = (0.0, 0.5, 0.95, 0.99, 1.0)
_SECONDS_PER_HOUR = 3600.0


class ScalingError(UnetError):
    """Measurements that nothing can be simulated from, or a load that no number of servers bears."""


@dataclass(frozen=True)
class ServiceTimes:
    """How long one server takes for a batch, in seconds.

    Attributes:
        batch_sizes: measured sizes, rising.
        quantiles: for each size the times at the shares 0, 0.5, 0.95, 0.99 and 1 of all requests.
    """

    batch_sizes: tuple[int, ...]
    quantiles: tuple[tuple[float, ...], ...]

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, float]]) -> ServiceTimes:
        """From a benchmark's rows, which know the median and the 95th and 99th percentile.

        The faster half is taken to need the median, and the slowest hundredth the 99th percentile.
        """
        measured = {int(row["batch_size"]): [row[f"{name}_ms"] / 1e3 for name in ("p50", "p95", "p99")] for row in rows}
        if not measured:
            raise ScalingError("the benchmark has no row to go by: run serve/benchmark.py again, on an idle machine")
        sizes = tuple(sorted(measured))
        return cls(sizes, tuple((measured[n][0], *measured[n], measured[n][2]) for n in sizes))

    @property
    def max_batch_size(self) -> int:
        """The largest measured batch."""
        return self.batch_sizes[-1]

    def draw(self, batch_size: int, share: float) -> float:
        """The time of a batch at a share of all requests; between measured sizes, in proportion."""
        times = [float(np.interp(share, _QUANTILES, quantiles)) for quantiles in self.quantiles]
        return float(np.interp(batch_size, self.batch_sizes, times))


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
    arrivals = np.cumsum(rng.exponential(1 / rate, requests))
    shares = rng.uniform(size=requests)
    latencies = np.empty(requests)
    free_at = [0.0] * servers
    first = 0
    while first < requests:
        start = max(heapq.heappop(free_at), float(arrivals[first]))
        waiting = int(np.searchsorted(arrivals, start, side="right")) - first
        batch = min(max(waiting, 1), times.max_batch_size)
        done = start + times.draw(batch, float(shares[first]))
        latencies[first : first + batch] = done - arrivals[first : first + batch]
        heapq.heappush(free_at, done)
        first += batch
    return latencies


@dataclass(frozen=True)
class Need:
    """The fewest servers that bear a load.

    Attributes:
        rate: arrivals per second.
        p50_ms: median latency.
        p99_ms: 99th percentile of the latency.
    """

    rate: float
    servers: int
    p50_ms: float
    p99_ms: float


def servers_needed(
    times: ServiceTimes, rate: float, p99_s: float, *, most: int = 4096, requests: int = 20_000, seed: int = 0
) -> Need:
    """The fewest servers whose 99th percentile stays within a budget.

    Raises:
        ScalingError: if none do, up to ``most``: a request takes longer than the budget even without waiting.
    """

    def attempt(servers: int) -> Need:
        latencies = simulate(times, rate, servers, requests, np.random.default_rng(seed)) * 1e3
        return Need(rate, servers, *(float(value) for value in np.percentile(latencies, (50, 99))))

    low, high = 0, 1
    while attempt(high).p99_ms > p99_s * 1e3:
        low, high = high, 2 * high
        if low >= most:
            raise ScalingError(
                f"no number of servers up to {most} answers 99 of 100 requests within {p99_s * 1e3:g} ms: one request "
                "alone takes that long; raise --p99_ms"
            )
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if attempt(middle).p99_ms <= p99_s * 1e3 else (middle, high)
    return attempt(high)


def volume_hours(img_per_s: float, tile_size: int, volume_bytes: float) -> float:
    """Hours that one server takes for an 8-bit volume of so many bytes, at its best throughput."""
    return volume_bytes / output_size(tile_size) ** 2 / img_per_s / _SECONDS_PER_HOUR
