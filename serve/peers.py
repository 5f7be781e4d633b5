"""The same network by other means, in one interleaved run: ``python serve/peers.py`` (``make peers``).

Each subject has the same weights and the same tiles, is measured in a process of its own in every round, one after
another, and its answer is compared with TensorFlow's. The machine's own limit is measured in the same rounds.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.measure.common import MeasureError, plain
from serve.measure.peers.comparison import OURS, comparisons_of, run
from serve.measure.peers.settings import PeersSettings
from serve.measure.peers.table import bars, convolution_gflop, report
from unet.card import Card
from unet.config import FlagParser, add_flags, from_flags
from unet.errors import command, say
from unet.files import atomic_file, write_json
from unet.files.demo import own_or_demo
from unet.machine import machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.measure.peers.comparison import Comparison


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = FlagParser(prog="serve/peers.py", description="Images per second of the same network by other means.")
    add_flags(parser, PeersSettings)
    parser.add_argument("--check", action="store_true", help="only look whether everything needed is there")
    chosen = parser.parse_args(argv)
    given = from_flags(PeersSettings, chosen)
    model_dir, artefacts = own_or_demo(given.model_dir, "result"), own_or_demo(given.artefacts, "artefacts")
    settings = replace(given, model_dir=model_dir, artefacts=artefacts)
    settings.check()
    card = Card.load(settings.artefacts)
    if chosen.check:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        comparisons = comparisons_of(settings, Path(folder))
        try:
            run(settings, comparisons)
        finally:
            if any(subject.img_per_s for subject in comparisons[0].subjects.values()):
                _write(settings, comparisons, card)
    failed = comparisons[0].subjects[OURS].failure or comparisons[0].unchecked
    if failed:
        raise MeasureError(f"this project's own engine could not be measured and compared: {failed}")
    return 0


def _write(settings: PeersSettings, comparisons: Sequence[Comparison], card: Card) -> None:
    """Print and write everything that was measured."""
    for one in comparisons:
        one.finish()
    gflop = convolution_gflop(settings.artefacts / "model.onnx", settings.tile_size)
    engine = f"{card.engine.kind} {card.engine.precision}"
    heading = f"{engine}, tiles of {settings.tile_size}, {settings.rounds} rounds, {machine()}"
    text = "\n\n".join([heading, *(report(one, gflop) for one in comparisons)])
    values: dict[str, Any] = {
        "settings": plain(asdict(settings)),
        "engine": engine,
        "machine": asdict(machine()),
        "gflop_per_tile": gflop,
    }
    for one in comparisons:
        reached = bars(one, gflop)
        values["held_to_" + one.isa if one.isa else "own_instructions"] = {
            "gemm_gflop_per_s": one.peaks,
            "subjects": {name: vars(subject) for name, subject in one.subjects.items()},
            "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in reached],
        }
    write_json(settings.out / "peers.json", values)
    with atomic_file(settings.out / "peers.md") as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    say(f"{text}\n\nall figures: {settings.out}")


if __name__ == "__main__":
    sys.exit(main())
