"""Images per second through Triton at batch 1, 8 and 16: ``python serve/benchmark.py``."""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serve.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, PerfRow
from serve.segmenter import Segmenter
from serve.slots import ClientError, on_this_machine
from unet.errors import command, say
from unet.files import atomic_file, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

LOGGER = logging.getLogger(__name__)

# The reference document's inference figures, img/s on one V100 16 GB at 572 x 572: (TF-AMP, FP32) by batch size.
V100_IMG_PER_S: dict[int, tuple[str, str]] = {
    1: ("62.81", "34.27"),
    8: ("79.62", "37.09"),
    16: ("83.33", "out of memory"),
}
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Row:
    """What one batch size came to: throughput is images over wall time, latencies are of whole requests."""

    batch_size: int
    requests: int
    img_per_s: float
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


def summarise(batch_size: int, latencies_s: Sequence[float], wall_s: float) -> Row:
    """The row of a run whose requests took ``latencies_s`` and which lasted ``wall_s``, both in seconds."""
    percentiles = (float(value) for value in np.percentile(np.array(latencies_s) * 1e3, (50, 95, 99)))
    mean_ms = float(np.mean(latencies_s)) * 1e3
    return Row(batch_size, len(latencies_s), batch_size * len(latencies_s) / wall_s, mean_ms, *percentiles)


def measure(
    segmenter: Segmenter, batch_size: int, tile_size: int, *, seconds: float, least_requests: int, warm_up: int = 2
) -> Row:
    """Send batches of random images one after another.

    Args:
        segmenter: the connection.
        batch_size: images in a request.
        tile_size: rows and columns of an image.
        seconds: how long to measure.
        least_requests: requests to measure even if that takes longer.
        warm_up: requests before, which are not measured.

    Raises:
        ClientError: if the server does not answer or refuses, or does not take such a batch.
    """
    if batch_size > segmenter.max_batch_size:
        raise ClientError(f"the model takes batches of {segmenter.max_batch_size} at most, not {batch_size}")
    shape = (batch_size, 1, tile_size, tile_size)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with segmenter.slot(shape) as send:
        for _ in range(warm_up):
            send(images)
        latencies_s: list[float] = []
        started = now = time.perf_counter()
        while len(latencies_s) < least_requests or now - started < seconds:
            send(images)
            latencies_s.append(time.perf_counter() - now)
            now = time.perf_counter()
    return summarise(batch_size, latencies_s, now - started)


def table(rows: Sequence[Row], others: dict[int, PerfRow | str], tile_size: int, transport: str) -> str:
    """The measured rows beside perf_analyzer's and the reference's, as a Markdown table."""
    lines = [
        f"Images of {tile_size} x {tile_size} through Triton, one request at a time, {transport}. The last two columns "
        "are the reference document's, measured by TensorFlow without a server on another machine, a V100.",
        "",
        "| batch | requests | img/s | p50 ms | p95 ms | p99 ms | perf_analyzer img/s | p50 ms | p95 ms | p99 ms "
        "| V100 FP16, reference | V100 FP32, reference |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        other = others.get(row.batch_size, NOT_MEASURED)
        second = (
            f"{other.img_per_s:.2f} | {other.p50_ms:.0f} | {other.p95_ms:.0f} | {other.p99_ms:.0f}"
            if isinstance(other, PerfRow)
            else f"{NOT_MEASURED} | | | "
        )
        amp, single = V100_IMG_PER_S.get(row.batch_size, (NOT_MEASURED, NOT_MEASURED))
        lines.append(
            f"| {row.batch_size} | {row.requests} | {row.img_per_s:.2f} | {row.p50_ms:.0f} | {row.p95_ms:.0f} "
            f"| {row.p99_ms:.0f} | {second} | {amp} | {single} |"
        )
    return "\n".join(lines)


def _second_opinion(url: str, model: str, tile_size: int, rows: Sequence[Row], out: Path) -> dict[int, PerfRow | str]:
    """perf_analyzer's row for each of ours, or why there is none."""
    found: dict[int, PerfRow | str] = {}
    try:
        analyzer = PerfAnalyzer(out)
    except PerfAnalyzerError as error:
        say(f"perf_analyzer: {error}")
        return found
    for row in rows:
        try:
            found[row.batch_size] = analyzer.measure(
                url,
                model,
                row.batch_size,
                tile_size,
                # Its windows are three at least: together they take about as long as ours.
                requests=max(3, row.requests // 3),
                shared_memory=on_this_machine(url),
            )
        except PerfAnalyzerError as error:
            say(f"perf_analyzer: {error}")
            found[row.batch_size] = str(error)
    return found


def _write(out: Path, rows: Sequence[Row], others: dict[int, PerfRow | str], text: str) -> None:
    with atomic_file(out / "benchmark.csv") as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    with atomic_file(out / "benchmark.md") as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    second = [asdict(other) for other in others.values() if isinstance(other, PerfRow)]
    write_json(out / "benchmark.json", {"rows": [asdict(row) for row in rows], "perf_analyzer": second})


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="serve/benchmark.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default="localhost:8001", help="HOST:PORT of the server's gRPC")
    parser.add_argument("--model_name", default="unet", help="the served model")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 16], help="images in a request")
    parser.add_argument("--tile_size", type=int, default=572, help="rows and columns of an image")
    parser.add_argument("--seconds", type=float, default=8, help="how long to measure each batch size")
    parser.add_argument("--requests", type=int, default=8, help="requests to measure even if that takes longer")
    parser.add_argument("--timeout_s", type=float, default=300, help="longest wait for an answer")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder for the tables")
    parser.add_argument("--no-perf_analyzer", action="store_true", help="leave perf_analyzer's rows out")
    chosen = parser.parse_args(argv)
    with Segmenter(chosen.url, chosen.model_name, timeout_s=chosen.timeout_s) as segmenter:
        rows = [
            measure(segmenter, size, chosen.tile_size, seconds=chosen.seconds, least_requests=chosen.requests)
            for size in chosen.batch_sizes
        ]
    chosen.out.mkdir(parents=True, exist_ok=True)
    others: dict[int, PerfRow | str] = {}
    if not chosen.no_perf_analyzer:
        others = _second_opinion(chosen.url, chosen.model_name, chosen.tile_size, rows, chosen.out)
    transport = "pixels in shared memory" if on_this_machine(chosen.url) else "pixels over the network"
    text = table(rows, others, chosen.tile_size, transport)
    _write(chosen.out, rows, others, text)
    say(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
