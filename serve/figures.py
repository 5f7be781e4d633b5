"""The client's figures, each a ratio of one interleaved run: ``python serve/figures.py WHAT``.

``tensorflow``: the same stack over a TensorFlow loop that predicts tiles of 572, as the reference does.
``memory``: the client's resident memory over the number of slices, and for slices of 16k x 16k, with its curve.
``servers``: slices a second over several servers at once over those of the first alone.
``soak``: many clients at once; every answer is checked against its own input.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

from serve.measure.common import MeasureError
from serve.measure.figures import FIGURES, FigureSettings
from serve.measure.progress import Progress
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, say
from unet.files import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure one thing, print it as JSON and keep it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # TensorFlow's start-up lines say nothing of the figure
    parser = FlagParser(prog="serve/figures.py", description=__doc__)
    parser.add_argument("what", choices=FIGURES, help="the figure to measure")
    add_flags(parser, FigureSettings)
    chosen = parser.parse_args(argv)
    settings = from_flags(FigureSettings, chosen)
    settings.out.mkdir(parents=True, exist_ok=True)
    with Progress(1) as progress, progress.step(chosen.what):
        found = FIGURES[chosen.what](settings)
    write_json(settings.out / f"{chosen.what}.json", found)
    say(json.dumps(found, indent=2))
    if found.get("wrong"):
        raise MeasureError(f"{found['wrong']} of {found['answers']} answers were wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main())
