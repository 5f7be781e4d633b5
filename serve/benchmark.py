"""The same tiles by every way, in one interleaved run: ``python serve/benchmark.py`` (``make benchmark``).

The engine alone in this process, Triton by gRPC and by shared memory, NVIDIA's perf_analyzer, and the client from file
to file. Every level is measured once in each round, and each round starts with another level, so that a slow moment of
the machine affects all of them; ratios are taken within a round. Results are written as they come.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from serve.measure.benchmark import Bench, BenchmarkSettings
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, say
from unet.files.demo import own_or_demo

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and keep."""
    parser = FlagParser(
        prog="serve/benchmark.py",
        description="Images per second and latencies of a served model, level by level, in one interleaved run.",
    )
    add_flags(parser, BenchmarkSettings)
    settings = from_flags(BenchmarkSettings, parser.parse_args(argv))
    bench = Bench(replace(settings, artefacts=own_or_demo(settings.artefacts, "artefacts")))
    bench.run()
    say(bench.report())
    bench.check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
