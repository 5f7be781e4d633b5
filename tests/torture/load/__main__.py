"""More than a server can do, and for long: ``python -m tests.torture.load --minutes 5 --out torture.md``.

First ten times the requests that the server can answer, with each policy of its queue. Then many inferences, and many
clients that are killed in the middle of one, with each backend: the server's memory stays, and it answers rightly.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.torture.load import memory, overload
from tests.torture.load.server import BACKENDS
from tests.torture.report import report
from unet.errors import say


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if something went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.load", description="More than a server can do.")
    parser.add_argument("--minutes", type=float, default=5, help="of ten times the load, for each policy (default: 5)")
    parser.add_argument("--inferences", type=int, default=100_000, help="for each backend (default: 100000)")
    parser.add_argument("--kills", type=int, default=1000, help="of clients, for each backend (default: 1000)")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="only this one of them")
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the figures are added to this file")
    chosen = parser.parse_args(argv)
    overloads = [
        overload.attack(60 * chosen.minutes, policy, note=say) for policy in overload.POLICIES if chosen.minutes
    ]
    lines = ["", "# Ten times the load", "", overload.HEAD, *(one.row() for one in overloads)]
    memories = [
        attack(times, backend, note=say)
        for backend in chosen.backend or BACKENDS
        for attack, times in ((memory.infer, chosen.inferences), (memory.kill, chosen.kills))
        if times
    ]
    lines += ["", "# Memory of the server", "", memory.HEAD, *(one.row() for one in memories), ""]
    findings = [each for one in overloads for each in (*one.faults, *one.late)]
    findings += [each for one in memories for each in (*one.faults, *one.grown)]
    return report([*lines, *(f"- {each}" for each in dict.fromkeys(findings))], chosen.out, findings)


if __name__ == "__main__":
    sys.exit(main())
