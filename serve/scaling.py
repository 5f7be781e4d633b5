"""How many servers a load needs, simulated from measured service times: ``python serve/scaling.py``.

It reads what ``serve/benchmark.py`` measured on one server and simulates more of them behind one queue: requests arrive
at random (a Poisson process, an open loop), and a free server takes all that wait, up to its largest batch, as Triton's
dynamic batcher does without a delay. One queue is the best that a load balancer can do, so the counts are lower bounds.
With ``--url`` the one server is measured with the same random arrivals beside the simulation.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.measure.common import MeasureError
from serve.measure.progress import Progress
from serve.measure.rows import lone_rows
from serve.measure.sizing.one_server import Beside, beside_table, beside_the_simulation
from serve.measure.sizing.shards import shard_cost
from serve.measure.sizing.simulation import Need, ScalingSettings, ServiceTimes, servers_needed, volume_hours
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, say
from unet.files import read_json, write_json
from unet.files.demo import own_or_demo
from unet.measure import markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

_USUAL = "benchmark/benchmark.json"


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return lone_rows(read_json(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MeasureError(
            f"{path} is not what serve/benchmark.py writes ({error}): run that first, or name --benchmark"
        ) from error


def _table(needs: Sequence[Need]) -> str:
    lines = [
        [
            *(f"{need.rate:g}", str(need.servers), f"{need.p50_ms:.0f}", f"{need.p99_ms:.0f}"),
            *(f"{need.p99_worst_ms:.0f}", f"{need.busy:.0%}"),
        ]
        for need in needs
    ]
    return markdown(["requests/s", "servers", "p50 ms", "p99 ms", "worst p99 ms", "busy"], lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Simulate, measure where asked, and print the tables."""
    parser = FlagParser(prog="serve/scaling.py", description=__doc__)
    add_flags(parser, ScalingSettings)
    settings = from_flags(ScalingSettings, parser.parse_args(argv))
    settings = replace(settings, benchmark=own_or_demo(settings.benchmark, _USUAL))
    rows = _rows(settings.benchmark)
    times, tile_size = ServiceTimes.from_rows(rows), int(rows[0]["tile_size"])
    best = max(float(row["img_per_s"]) for row in rows)
    hours = volume_hours(best, tile_size, settings.terabytes * 1e12)
    shards = shard_cost(settings.terabytes * 1e12, settings.shard_mpx, best, tile_size, settings.client_mpx_per_s)
    needs: list[Need] = []
    measured: list[Beside] = []
    steps = len(settings.rates) + len(settings.shares) * bool(settings.url)
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(steps))
        # What was found is kept whatever comes after it.
        stack.callback(lambda: _write(settings, needs, measured, hours))
        for rate in settings.rates:
            with progress.step(f"{rate:g} requests/s"):
                needs.append(servers_needed(times, rate, settings.p99_ms / 1e3))
        say(f"One server: {best:.1f} img/s at best, tiles of {tile_size}, batches up to {times.max_batch_size}.")
        say(f"Fewest servers for 99 of 100 answers within {settings.p99_ms:g} ms (simulated, one queue):\n")
        say(_table(needs))
        price = hours * settings.price_per_hour
        said = f", {price:,.0f} at {settings.price_per_hour:g} an hour" if settings.price_per_hour else ""
        say(f"\n{settings.terabytes:g} TB of 8-bit slices: {hours:,.0f} server hours{said}.")
        say(f"By shards of {settings.shard_mpx:g} million pixels: {shards}.")
        for share in settings.shares if settings.url else ():
            with progress.step(f"one server at {share:.0%} of its capacity"):
                measured.append(beside_the_simulation(settings, times, tile_size, share * times.capacity))
        if measured:
            say(f"\nOne server, random arrivals, measured beside the simulation:\n\n{beside_table(measured)}")
    return 0


def _write(settings: ScalingSettings, needs: Sequence[Need], measured: Sequence[Beside], hours: float) -> None:
    values = {
        "benchmark": str(settings.benchmark),
        "needs": [asdict(need) for need in needs],
        "server_hours": hours,
        "one_server": [asdict(one) for one in measured],
    }
    write_json(settings.out, values)


if __name__ == "__main__":
    sys.exit(main())
