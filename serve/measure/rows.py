"""Rows of the benchmark: the result of one level under one load, and whether it can be relied on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.measure.common import LEAST_REQUESTS, percentiles
from serve.measure.levels import WAYS
from serve.measure.perf_analyzer import COLUMNS, STABLE_PERCENT
from unet.geometry import plan_tiles
from unet.machine import usable_cores

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from serve.measure.levels import Load, Sample

SLICE_PX = 512
# Little's law holds for means over the same period; the ends of a short period do not fit exactly.
_LITTLE_TOLERANCE = 0.2
# The mean of equal latencies differs from them by the rounding of their sum.
_ROUNDING = 1e-9
# Largest over smallest rate of the rounds; above it the machine did something else in some of them.
_LARGEST_SPREAD = 1.5
# The share of the cores that other processes than ours and the server's may take.
_LARGEST_OTHER_SHARE = 0.1


@dataclass(frozen=True)
class Row:
    """One level under one load.

    Attributes:
        img_per_s: images over wall time, all rounds together.
        rounds: the same of each round.
        requests: that were answered; None where perf_analyzer does not say.
        mean_ms: of a request, from its sending to its answer.
        p50_ms: and so on: percentiles of the same; None where there were too few requests, see `LEAST_REQUESTS`.
        max_ms: the slowest request.
        queue_ms: of that, waiting in the server for an engine, the mean by the server's own counts; None without one.
        compute_input_ms: bringing the pixels to the engine.
        compute_infer_ms: in the engine, for Triton's python backend with the way to it.
        compute_output_ms: bringing the answer back.
        images_per_pass: the batch that dynamic batching achieved.
        client_cores: cores' worth of time that the client took.
        server_cores: and the server; None where it cannot be seen.
        other_cores: and everything else on the machine.
        server_rss_mib: resident memory of the server and its backends.
        gpu_percent: utilisation of the GPU; None without one.
        gpu_mib: its memory in use.
        wire_bytes_per_img: over the network or the loopback interface.
        refused: why the row cannot be relied on; empty if it can.
    """

    level: str
    tile_size: int
    batch_size: int
    concurrency: int
    img_per_s: float
    rounds: tuple[float, ...]
    requests: int | None = None
    mean_ms: float | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    p95_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None
    queue_ms: float | None = None
    compute_input_ms: float | None = None
    compute_infer_ms: float | None = None
    compute_output_ms: float | None = None
    images_per_pass: float | None = None
    client_cores: float | None = None
    server_cores: float | None = None
    other_cores: float | None = None
    server_rss_mib: float | None = None
    gpu_percent: float | None = None
    gpu_mib: float | None = None
    wire_bytes_per_img: float | None = None
    refused: str = ""

    @property
    def slices_per_s(self) -> float:
        """Slices of 512 x 512 a second that so many tiles make."""
        return self.img_per_s / len(plan_tiles(SLICE_PX, SLICE_PX, self.tile_size))

    def columns(self) -> dict[str, str]:
        """The row by perf_analyzer's names for its columns, times in microseconds; empty where nothing was measured."""
        shares = self.queue_ms, self.compute_input_ms, self.compute_infer_ms, self.compute_output_ms
        network = None
        if self.mean_ms is not None and self.queue_ms is not None:
            network = self.mean_ms - sum(share or 0.0 for share in shares)
        times = (None, network, *shares, None, self.p50_ms, self.p90_ms, self.p95_ms, self.p99_ms)
        words = ["" if time is None else f"{time * 1e3:.0f}" for time in times]
        return dict(zip(COLUMNS, (str(self.concurrency), f"{self.img_per_s:.4f}", *words)))


def lone_rows(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a benchmark's JSON through Triton with one request at a time, of its first tile size.

    Those with shared memory if there are any, else those by gRPC; refused rows are left out.
    """
    rows = [row for row in record["rows"] if row["concurrency"] == 1 and not row["refused"]]
    for level in WAYS.values():
        found = [row for row in rows if row["level"] == level]
        if found:
            return [row for row in found if row["tile_size"] == found[0]["tile_size"]]
    return []


def summarise(level: str, load: Load, samples: Sequence[Sample]) -> Row:
    """The row of a level's rounds."""
    rounds = tuple(sample.img_per_s for sample in samples)
    rate = sum(sample.images for sample in samples) / sum(sample.wall_s for sample in samples)
    values: dict[str, float | None] = {}
    values |= _from_perf_analyzer(samples) if samples[0].perf is not None else _latencies(samples)
    values |= _server_counts(samples) | _costs(samples)
    requests = sum(len(one.latencies_s) if one.perf is None else one.perf.requests for one in samples) or None
    where = level, load.tile_size, load.batch_size, load.concurrency
    alone = samples[0].server is None and samples[0].perf is None
    refused = _foreign(samples) or refusal(
        replace(load, concurrency=1) if alone else load, rate, rounds, values, requests
    )
    return Row(*where, rate, rounds, requests, **values, refused=refused)  # type: ignore[arg-type]


def _foreign(samples: Sequence[Sample]) -> str:
    """Why rounds do not tell of the engine, or not steadily; empty if they do."""
    cached = sum(sample.cached for sample in samples)
    if cached:
        return f"answered from the response cache: {cached} requests never came to the engine"
    loose = sum(sample.perf is not None and not sample.perf.stable for sample in samples)
    if loose:
        return f"unstable: in {loose} of {len(samples)} runs its windows did not agree within {STABLE_PERCENT:g} %"
    return ""


def _latencies(samples: Sequence[Sample]) -> dict[str, float | None]:
    taken_s = np.concatenate([sample.latencies_s for sample in samples])
    shares = {f"p{share}_ms": value for share, value in percentiles(taken_s).items()}
    return {"mean_ms": float(taken_s.mean()) * 1e3, **shares, "max_ms": float(taken_s.max()) * 1e3}


def _from_perf_analyzer(samples: Sequence[Sample]) -> dict[str, float | None]:
    """The means over its runs; it keeps single latencies to itself, so each run needs enough requests of its own."""
    fewest = min(sample.perf.requests for sample in samples if sample.perf is not None)
    names = {f"p{share}_ms": f"p{share} latency" for share, least in LEAST_REQUESTS.items() if fewest >= least}
    names |= {"queue_ms": "Server Queue", "compute_input_ms": "Server Compute Input"}
    names |= {"compute_infer_ms": "Server Compute Infer", "compute_output_ms": "Server Compute Output"}
    rows = [sample.perf for sample in samples if sample.perf is not None]
    return {ours: float(np.mean([row.ms(theirs) for row in rows])) for ours, theirs in names.items()}


def _server_counts(samples: Sequence[Sample]) -> dict[str, float | None]:
    counts = [sample.server for sample in samples if sample.server is not None]
    requests = sum(count.requests for count in counts)
    if not requests:
        return {}
    names = ("queue", "compute_input", "compute_infer", "compute_output")
    times: dict[str, float | None] = {
        f"{name}_ms": sum(getattr(count, f"{name}_ns") for count in counts) / requests / 1e6 for name in names
    }
    passes = sum(count.passes for count in counts)
    return {**times, "images_per_pass": sum(count.images for count in counts) / passes} if passes else times


def _costs(samples: Sequence[Sample]) -> dict[str, float | None]:
    costs = [sample.cost for sample in samples if sample.cost is not None]
    if not costs:
        return {}
    wall_s = sum(sample.wall_s for sample in samples)
    values: dict[str, float | None] = {"other_cores": sum(cost.other_cpu_s for cost in costs) / wall_s}
    if samples[0].perf is not None:
        return values  # the rest is as much of its start as of its load
    values["client_cores"] = sum(cost.client_cpu_s for cost in costs) / wall_s
    if samples[0].server is None:
        return values  # no server took part
    values["wire_bytes_per_img"] = sum(cost.wire_bytes for cost in costs) / sum(sample.images for sample in samples)
    if all(cost.server_cpu_s is not None for cost in costs):
        values["server_cores"] = sum(cost.server_cpu_s or 0.0 for cost in costs) / wall_s
    for name in ("server_rss_mib", "gpu_percent", "gpu_mib"):
        known = [getattr(cost, name) for cost in costs if getattr(cost, name) is not None]
        if known:
            values[name] = float(max(known))
    return values


def refusal(
    load: Load, rate: float, rounds: Sequence[float], values: Mapping[str, float | None], requests: int | None = None
) -> str:
    """Why a row contradicts itself or was disturbed; empty if neither.

    Args:
        load: what was asked for.
        rate: images a second.
        rounds: the same in each round.
        values: the row's other figures, by name.
        requests: how many there were.
    """
    mean_ms, p99_ms = values.get("mean_ms"), values.get("p99_ms")
    if mean_ms is not None and p99_ms is not None and mean_ms > p99_ms * (1 + _ROUNDING):
        return f"the mean latency, {mean_ms:.1f} ms, is beyond the 99th percentile, {p99_ms:.1f} ms"
    if mean_ms is not None:
        # Little's law: images in flight = rate x time in flight. The last answers come one by one.
        expected = load.batch_size * load.concurrency / mean_ms * 1e3
        ends = (load.concurrency - 1) / requests if requests else 0.0
        if abs(rate / expected - 1) > _LITTLE_TOLERANCE + ends:
            return f"{rate:.1f} img/s do not fit a mean latency of {mean_ms:.1f} ms, which makes {expected:.1f}"
    if max(rounds) > _LARGEST_SPREAD * min(rounds):
        return f"not stable: its rounds gave {min(rounds):.1f} to {max(rounds):.1f} img/s"
    other = values.get("other_cores") or 0.0
    if other > _LARGEST_OTHER_SHARE * usable_cores():
        return f"another load on the machine took {other:.1f} cores meanwhile"
    return ""
