"""The client's figures, each a ratio of one interleaved run: ``python serve/figures.py WHAT``.

``tensorflow``: the same stack over a TensorFlow loop that predicts tiles of 572, as the reference does.
``memory``: the client's resident memory over the number of slices, and for slices of 16k x 16k, with its curve.
``servers``: slices a second over several servers at once over those of the first alone.
``soak``: many clients at once; every answer is checked against its own input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from serve.measure.figures import FIGURES
from unet.errors import command, say
from unet.files import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure one thing, print it as JSON and keep it."""
    parser = argparse.ArgumentParser(
        prog="serve/figures.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=FIGURES)
    parser.add_argument("--url", default="localhost:8001", help="HOST:PORT of the server's gRPC")
    parser.add_argument(
        "--servers", nargs="+", default=["localhost:8001", "localhost:9001"], help="HOST:PORT of each, of `servers`"
    )
    parser.add_argument("--saved_model", type=Path, default=Path("result/saved_model"), help="for `tensorflow`")
    parser.add_argument("--images", type=Path, default=Path("data/train-volume.tif"), help="a stack")
    parser.add_argument("--labels", type=Path, help="its labels, to compare scores in `tensorflow`")
    parser.add_argument("--pages", type=int, nargs=2, default=(24, 30), help="slices of it for `tensorflow`")
    parser.add_argument("--rounds", type=int, default=9, help="turns that the measured things take")
    parser.add_argument("--slices", type=int, nargs="+", default=[30, 300, 3000], help="lengths of `memory`'s stacks")
    parser.add_argument("--side", type=int, default=512, help="of `memory`'s slices")
    parser.add_argument("--large", action="store_true", help="`memory` with a slice of 16k x 16k too")
    parser.add_argument("--clients", type=int, default=64, help="of `soak`")
    parser.add_argument("--seconds", type=float, default=600, help="of `soak`")
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="of `soak`: engines round differently in batches of other sizes"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmark"), help="folder for what is found")
    chosen = parser.parse_args(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    found = FIGURES[chosen.what](chosen)
    write_json(chosen.out / f"{chosen.what}.json", found)
    say(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
