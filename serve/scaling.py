"""How many servers a load needs, simulated from measured service times: ``python serve/scaling.py``.

It reads what ``serve/benchmark.py`` measured on one server and simulates more of them behind one queue: requests arrive
at random (a Poisson process), and a free server takes all that wait, up to its largest batch, as Triton's dynamic
batcher does without a delay. One queue is the best that a load balancer can do, so the counts are lower bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from serve.measure.rows import lone_rows
from serve.measure.scaling import ScalingError, ServiceTimes, servers_needed, volume_hours
from unet.errors import command, say
from unet.files import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve/scaling.py",
        description="How many servers a load needs, simulated from what serve/benchmark.py measured on one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--benchmark", type=Path, default=Path("benchmark/benchmark.json"), help="what was measured on one server"
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[10, 30, 100, 300, 1000], help="arrivals per second")
    parser.add_argument("--p99_ms", type=float, default=1000, help="99 of 100 answers must come within")
    parser.add_argument("--terabytes", type=float, default=1, help="size of an 8-bit volume to segment at rest")
    parser.add_argument("--price_per_hour", type=float, help="of one server, to price the volume")
    parser.add_argument("--out", type=Path, default=Path("scaling.json"), help="file for all figures")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print the table."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    if min(chosen.rates) <= 0 or chosen.p99_ms <= 0 or chosen.terabytes <= 0:
        parser.error("--rates, --p99_ms and --terabytes must be positive")
    try:
        rows = lone_rows(json.loads(chosen.benchmark.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScalingError(
            f"{chosen.benchmark} is not what serve/benchmark.py writes ({error}): run that first, or name --benchmark"
        ) from error
    times, tile_size = ServiceTimes.from_rows(rows), int(rows[0]["tile_size"])
    best = max(float(row["img_per_s"]) for row in rows)
    needs = [servers_needed(times, rate, chosen.p99_ms / 1e3) for rate in chosen.rates]
    hours = volume_hours(best, tile_size, chosen.terabytes * 1e12)
    price = (
        f", {hours * chosen.price_per_hour:,.0f} at {chosen.price_per_hour:g} an hour" if chosen.price_per_hour else ""
    )
    lines = [
        f"One server: {best:.1f} img/s at best, tiles of {tile_size}, batches up to {times.max_batch_size}.",
        f"Fewest servers for 99 of 100 answers within {chosen.p99_ms:g} ms (simulated, one queue):",
        "",
        "| requests/s | servers | p50 ms | p99 ms | busy |",
        "|---:|---:|---:|---:|---:|",
        *(
            f"| {need.rate:g} | {need.servers} | {need.p50_ms:.0f} | {need.p99_ms:.0f} | "
            f"{need.rate / need.servers / best:.0%} |"
            for need in needs
        ),
        "",
        f"{chosen.terabytes:g} TB of 8-bit slices: {hours:,.0f} server hours{price}.",
    ]
    write_json(
        chosen.out,
        {"benchmark": str(chosen.benchmark), "needs": [asdict(need) for need in needs], "server_hours": hours},
    )
    say("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
