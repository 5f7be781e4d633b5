"""The same tiles by every way, in one interleaved run: ``python serve/benchmark.py`` (``make benchmark``).

The engine alone in this process, Triton by gRPC and by shared memory, NVIDIA's perf_analyzer, and the client from file
to file. Every level is measured once in each round, and each round starts with another level, so that a slow moment of
the machine affects all of them; ratios are taken within a round. Results are written as they come.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve.measure.benchmark import Bench, BenchmarkSettings
from serve.measure.common import own_or_demo
from unet.errors import command, say

if TYPE_CHECKING:
    from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve/benchmark.py",
        description="Images per second and latencies of a served model, level by level, in one interleaved run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--url", default="localhost:8001", help="HOST:PORT of the server's gRPC")
    parser.add_argument("--model_name", default="unet", help="the served model")
    parser.add_argument(
        "--artefacts",
        type=Path,
        default=argparse.SUPPRESS,
        help="what is served, for the engine alone (default: artefacts, or demo/artefacts where there is none)",
    )
    parser.add_argument("--tile_sizes", type=int, nargs="+", default=[572], help="rows and columns of an image")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 16], help="images in a request")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1], help="requests at a time")
    parser.add_argument("--rounds", type=int, default=3, help="turns that the levels take")
    parser.add_argument("--seconds", type=float, default=6, help="for each level under each load, all rounds together")
    parser.add_argument(
        "--slices", type=int, default=15, help="of 512 x 512, in the stack that goes from file to file; 0 for none"
    )
    parser.add_argument("--timeout_s", type=float, default=300, help="longest wait for an answer")
    parser.add_argument(
        "--shared_memory", choices=("auto", "on", "off", "cuda"), default="auto", help="with a server on this machine"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder for tables and charts")
    parser.add_argument("--no_perf_analyzer", action="store_true", help="leave perf_analyzer's rows out")
    parser.add_argument("--no-perf_analyzer", action="store_true", dest="no_perf_analyzer", help=argparse.SUPPRESS)
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    chosen = vars(_parser().parse_args(argv))
    artefacts = own_or_demo(chosen.pop("artefacts", None), "artefacts")
    bench = Bench(BenchmarkSettings(artefacts=artefacts, **chosen))
    bench.run()
    say(bench.report())
    bench.check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
