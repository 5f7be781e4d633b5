"""Images per second through Triton at batch 1, 8 and 16: ``python serve/benchmark.py``."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.connection import ClientError
from serve.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, PerfRow
from serve.segmenter import SHARED_MEMORY, Segmenter
from unet.errors import command, say
from unet.files import atomic_file, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

# The reference document's inference figures, img/s on one V100 16 GB at 572 x 572: (TF-AMP, FP32) by batch size.
V100_IMG_PER_S: dict[int, tuple[str, str]] = {
    1: ("62.81", "34.27"),
    8: ("79.62", "37.09"),
    16: ("83.33", "out of memory"),
}
NOT_MEASURED = "not measured"
_LEAST_REQUESTS = 3
# A machine too slow for the wanted number of requests gets this many times the wanted seconds for fewer.
_PATIENCE = 4
_HEADINGS = (
    *("batch", "requests", "img/s", "p50 ms", "p95 ms", "p99 ms"),
    *("perf_analyzer img/s", "p50 ms", "p95 ms", "p99 ms", "V100 FP16 img/s", "V100 FP32 img/s"),
)


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
    shared_memory: bool


def summarise(batch_size: int, latencies_s: Sequence[float], wall_s: float, shared_memory: bool) -> Row:
    """The row of a run whose requests took ``latencies_s`` and which lasted ``wall_s``, both in seconds."""
    p50_ms, p95_ms, p99_ms = (float(value) for value in np.percentile(np.array(latencies_s) * 1e3, (50, 95, 99)))
    mean_ms = float(np.mean(latencies_s)) * 1e3
    img_per_s = batch_size * len(latencies_s) / wall_s
    return Row(batch_size, len(latencies_s), img_per_s, mean_ms, p50_ms, p95_ms, p99_ms, shared_memory)


def measure(
    segmenter: Segmenter, batch_size: int, tile_size: int, *, seconds: float, requests: int, warm_up: int = 2
) -> Row:
    """Send batches of random images one after another.

    Args:
        segmenter: the connection.
        batch_size: images in a request.
        tile_size: rows and columns of an image.
        seconds: how long to measure, at least; at most four times as long, and three requests.
        requests: to measure, at least, as far as that time allows.
        warm_up: requests before, which are not measured.

    Raises:
        ClientError: if the server does not answer or refuses, or does not take such a batch.
    """
    if not 1 <= batch_size <= segmenter.max_batch_size:
        raise ClientError(f"the model takes batches of 1 to {segmenter.max_batch_size}, not of {batch_size}")
    shape = (batch_size, 1, tile_size, tile_size)
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    with segmenter.slot(shape) as (send, shared):
        for _ in range(warm_up):
            send(images)
        latencies_s: list[float] = []
        started = now = time.perf_counter()
        while not _enough(len(latencies_s), requests, now - started, seconds):
            send(images)
            latencies_s.append(time.perf_counter() - now)
            now = time.perf_counter()
    return summarise(batch_size, latencies_s, now - started, shared)


def _enough(done: int, requests: int, elapsed_s: float, seconds: float) -> bool:
    if done < min(requests, _LEAST_REQUESTS):
        return False
    return elapsed_s >= seconds and (done >= requests or elapsed_s >= _PATIENCE * seconds)


def table(rows: Sequence[Row], others: dict[int, PerfRow | str], tile_size: int) -> str:
    """The measured rows beside perf_analyzer's and the reference's, as an aligned Markdown table."""
    lines = [_HEADINGS]
    for row in rows:
        other = others.get(row.batch_size)
        ours = f"{row.img_per_s:.2f}", f"{row.p50_ms:.1f}", f"{row.p95_ms:.1f}", f"{row.p99_ms:.1f}"
        theirs = (
            (f"{other.img_per_s:.2f}", f"{other.p50_ms:.1f}", f"{other.p95_ms:.1f}", f"{other.p99_ms:.1f}")
            if isinstance(other, PerfRow)
            else (NOT_MEASURED, "", "", "")
        )
        v100 = V100_IMG_PER_S.get(row.batch_size) if tile_size == 572 else None
        lines.append((str(row.batch_size), str(row.requests), *ours, *theirs, *(v100 or (NOT_MEASURED,) * 2)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADINGS))]
    text = [" | ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines]
    rule = "|".join("-" * (width + 1) + ":" for width in widths)
    ways = sorted({"in shared memory" if row.shared_memory else "over the connection" for row in rows})
    return "\n".join(
        [
            f"Images of {tile_size} x {tile_size} through Triton, one request at a time, pixels {' or '.join(ways)}.",
            "The V100 columns are another machine's: the reference document measured TensorFlow there, with no server.",
            "",
            f"| {text[0]} |",
            f"|{rule}|",
            *(f"| {line} |" for line in text[1:]),
        ]
    )


def _second_opinion(
    url: str, model: str, tile_size: int, rows: Sequence[Row], out: Path, timeout_s: float
) -> dict[int, PerfRow | str]:
    """perf_analyzer's row for each of ours, or why there is none."""
    found: dict[int, PerfRow | str] = {}
    try:
        analyzer = PerfAnalyzer(out)
    except PerfAnalyzerError as error:
        return dict.fromkeys((row.batch_size for row in rows), str(error))
    for row in rows:
        try:
            # Its windows are three at least: together they take about as long as ours.
            found[row.batch_size] = analyzer.measure(
                url,
                model,
                row.batch_size,
                tile_size,
                requests=max(3, row.requests // 3),
                shared_memory=row.shared_memory,
                timeout_s=timeout_s,
            )
        except PerfAnalyzerError as error:
            found[row.batch_size] = str(error)
    return found


def _write(out: Path, rows: Sequence[Row], others: dict[int, PerfRow | str], text: str, settings: Any) -> None:
    """Write the table as Markdown, CSV and JSON."""
    reference = {
        str(size): {"tf_amp_img_per_s": amp, "fp32_img_per_s": single} for size, (amp, single) in V100_IMG_PER_S.items()
    }
    second = [asdict(other) for other in others.values() if isinstance(other, PerfRow)]
    lines = [{"source": "unet", **asdict(row)} for row in rows] + [{"source": "perf_analyzer", **row} for row in second]
    with atomic_file(out / "benchmark.csv") as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), restval=NOT_MEASURED)
        writer.writeheader()
        writer.writerows(lines)
    with atomic_file(out / "benchmark.md") as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    values = {
        "settings": settings,
        "rows": [asdict(row) for row in rows],
        "perf_analyzer": second,
        "not_measured": {str(size): other for size, other in others.items() if isinstance(other, str)},
        "reference_v100_another_machine": reference,
    }
    write_json(out / "benchmark.json", values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve/benchmark.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--url", default="localhost:8001", help="HOST:PORT of the server's gRPC")
    parser.add_argument("--model_name", default="unet", help="the served model")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 16], help="images in a request")
    parser.add_argument("--tile_size", type=int, default=572, help="rows and columns of an image")
    parser.add_argument("--seconds", type=float, default=8, help="how long to measure each batch size")
    parser.add_argument(
        "--requests", type=int, default=8, help=f"to measure even if they take up to {_PATIENCE} times as long"
    )
    parser.add_argument("--timeout_s", type=float, default=300, help="longest wait for an answer")
    parser.add_argument("--shared_memory", choices=SHARED_MEMORY, default="auto", help="with a server on this machine")
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder for the tables")
    parser.add_argument("--no-perf_analyzer", action="store_true", help="leave perf_analyzer's rows out")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = _parser()
    chosen = parser.parse_args(argv)
    if chosen.seconds <= 0 or chosen.requests < 1:
        parser.error("--seconds must be positive, --requests at least 1")
    url, model, tile_size = chosen.url, chosen.model_name, chosen.tile_size
    with Segmenter(url, model, timeout_s=chosen.timeout_s, shared_memory=chosen.shared_memory) as segmenter:
        rows = [
            measure(segmenter, size, tile_size, seconds=chosen.seconds, requests=chosen.requests)
            for size in dict.fromkeys(chosen.batch_sizes)
        ]
    others: dict[int, PerfRow | str] = {}
    if not chosen.no_perf_analyzer:
        others = _second_opinion(url, model, tile_size, rows, chosen.out, timeout_s=2 * chosen.timeout_s)
    text = table(rows, others, tile_size)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
    _write(chosen.out, rows, others, text, settings)
    say(text)
    for reason in dict.fromkeys(other for other in others.values() if isinstance(other, str)):
        say(f"{NOT_MEASURED}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
