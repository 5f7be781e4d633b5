"""How a published model behaves on this machine: readiness, first answer, batching: ``python serve/trial.py``.

Serves artefacts from a folder of its own, once for each combination of queue delay, queue limit and instances, on free
ports, and asks one tile at a time from one client and from several. What serves best within a latency budget is written
down as the suggested way to publish.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve.measure.trial import HEADINGS, row, suggest, suggestion, try_out
from serve.models.config import ModelSettings
from unet.errors import command, say
from unet.files import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Try every combination and print the table."""
    parser = argparse.ArgumentParser(
        prog="serve/trial.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder that export/main.py wrote")
    parser.add_argument("--max_queue_delay_us", type=int, nargs="+", default=[0], help="to try, one after the other")
    parser.add_argument("--max_queue_size", type=int, nargs="+", default=[0], help="to try; 0 is no queue policy")
    parser.add_argument("--instances", type=int, nargs="+", default=[0], help="to try; 0: by the machine")
    parser.add_argument("--threads", type=int, default=0, help="of each instance; 0 shares out the cores")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16], help="that ask at the same time")
    parser.add_argument("--tile_size", type=int, default=572, help="rows and columns of a tile")
    parser.add_argument("--seconds", type=float, default=8, help="for each number of clients")
    parser.add_argument("--p99_ms", type=float, default=1000, help="99 of 100 answers must come within")
    parser.add_argument("--out", type=Path, default=Path("suggested_profile.json"), help="file for what serves best")
    chosen = parser.parse_args(argv)
    if chosen.seconds <= 0 or min(chosen.clients) < 1:
        parser.error("--seconds must be positive, --clients at least 1")
    trials = []
    say(f"| {' | '.join(HEADINGS)} |\n|{'---:|' * len(HEADINGS)}")
    for delay_us, size, instances in itertools.product(
        chosen.max_queue_delay_us, chosen.max_queue_size, chosen.instances
    ):
        settings = ModelSettings(
            threads=chosen.threads, max_queue_delay_us=delay_us, max_queue_size=size, instances=instances
        )
        trial = try_out(chosen.artefacts, settings, chosen.clients, tile_size=chosen.tile_size, seconds=chosen.seconds)
        trials.append(trial)
        for load in trial.loads:
            say(row(trial, load))
    best = suggestion(*suggest(trials, chosen.p99_ms), chosen.p99_ms, chosen.artefacts)
    write_json(chosen.out, best)
    say(f"\n{best['measured']['img_per_s']:.1f} img/s within {chosen.p99_ms:g} ms ({chosen.out}): {best['command']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
