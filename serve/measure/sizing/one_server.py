"""One real server under random arrivals, beside what the simulation and perf_analyzer say."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve.measure.open_loop import OpenLoad, SecondOpinion, open_load, second_opinion
from serve.measure.perf_analyzer import PerfAnalyzer
from serve.measure.sizing.simulation import Need, latency_of
from serve.measure.tables import figure
from serve.segment.connection import Connection
from unet.measure import markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.measure.sizing.simulation import ScalingSettings, ServiceTimes

_TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Beside:
    """One rate: measured on the server, simulated from its service times, and by perf_analyzer.

    Attributes:
        measured: by this project's open loop.
        simulated: what the simulation says of one server.
        perf: what perf_analyzer says.
    """

    measured: OpenLoad
    simulated: Need
    perf: SecondOpinion


def beside_the_simulation(settings: ScalingSettings, times: ServiceTimes, tile_size: int, rate: float) -> Beside:
    """Measure the server at one rate of random arrivals, and simulate it.

    Args:
        settings: where it is and how many requests arrive.
        times: its service times.
        tile_size: rows and columns of a tile.
        rate: arrivals a second.

    Raises:
        ClientError: it does not answer or refuses.
        MeasureError: answers are missing.
    """
    perf = SecondOpinion(note="left out")
    with tempfile.TemporaryDirectory() as folder:
        connection = Connection(settings.url, settings.model_name, "", _TIMEOUT_S)
        try:
            measured = open_load(connection, tile_size, rate, settings.requests)
            if settings.perf_analyzer:
                perf = second_opinion(PerfAnalyzer(Path(folder)), connection, tile_size, rate, settings.requests)
        finally:
            connection.close()
    return Beside(measured, latency_of(times, rate, 1), perf)


def beside_table(found: Sequence[Beside]) -> str:
    """Measured, simulated and perf_analyzer's latencies, one rate a line."""
    lines = []
    for one in found:
        cells = [
            one.measured.percentile_ms(50),
            one.simulated.p50_ms,
            one.measured.percentile_ms(99),
            one.simulated.p99_ms,
        ]
        lines.append(
            [f"{one.measured.rate:.1f}", one.measured.outcome, *(figure(cell, 0) for cell in cells), str(one.perf)]
        )
    head = ["arrivals/s", "answers/s", "p50 ms", "simulated p50 ms", "p99 ms", "simulated p99 ms"]
    return markdown([*head, "perf_analyzer p99 ms"], lines)
