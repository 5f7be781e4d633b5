"""The same network by other means, in one interleaved run: ``python serve/peers.py`` (``make peers``).

Each subject has the same weights and the same tiles, is measured in a process of its own in every round, one after
another, and its answer is compared with TensorFlow's. The machine's own limit is measured in the same rounds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from serve.measure.peer_worker import SUBJECTS
from serve.measure.peers import OURS, REFERENCE, Comparison, PeersError, convolution_gflop, prepare, table, tiles_of
from unet.card import Card
from unet.errors import command, say
from unet.files import atomic_file, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="serve/peers.py",
        description="Images per second of the same network by other means.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model_dir", type=Path, default=Path("result"), help="the trainer's results")
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="what was exported from them")
    parser.add_argument("--data", type=Path, help="8-bit stack to take tiles from; a synthetic one where not given")
    parser.add_argument(
        "--python", type=Path, default=Path(".venv-peers/bin/python"), help="where PyTorch is installed"
    )
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), help="what to measure")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 16], help="tiles in a call")
    parser.add_argument("--tile_size", type=int, default=572, help="rows and columns of a tile")
    parser.add_argument("--rounds", type=int, default=3, help="each subject is measured so many times, in turn")
    parser.add_argument("--seconds", type=float, default=3, help="how long each time, for each batch size")
    parser.add_argument("--out", type=Path, default=Path("peers"), help="folder for the table")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    chosen = _parser().parse_args(argv)
    card = Card.load(chosen.artefacts)
    for needed in (chosen.model_dir / "saved_model", chosen.artefacts / "model.onnx"):
        if not needed.exists():
            raise PeersError(f"{needed} does not exist: train and export first, or name --model_dir and --artefacts")
    names = list(dict.fromkeys([OURS, REFERENCE, *chosen.subjects, "gemm"]))
    pythons = {name: str(chosen.python) if name.startswith(("pytorch", "gemm")) else sys.executable for name in names}
    if not chosen.python.exists():
        say(f"{chosen.python} does not exist (make peers-install): PyTorch and the matrix product are left out")
        pythons = {name: python for name, python in pythons.items() if python == sys.executable}
    with tempfile.TemporaryDirectory() as folder:
        tiles = tiles_of(chosen.data, max(chosen.batch_sizes), chosen.tile_size)
        prepare(Path(folder), chosen.model_dir, chosen.artefacts, tiles)
        comparison = Comparison(Path(folder), pythons, chosen.seconds, chosen.batch_sizes)
        comparison.run(chosen.rounds)
    gflop = convolution_gflop(chosen.artefacts / "model.onnx", chosen.tile_size)
    text = table(comparison, gflop, card.engine.precision)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(chosen).items()}
    values = {
        "settings": settings,
        "engine": f"{card.engine.kind} {card.engine.precision}",
        "gflop_per_tile": gflop,
        "gemm_gflop_per_s": comparison.peaks,
        "subjects": {name: vars(subject) for name, subject in comparison.subjects.items()},
    }
    write_json(chosen.out / "peers.json", values)
    with atomic_file(chosen.out / "peers.md") as aside:
        aside.write_text(text + "\n", encoding="utf-8")
    say(f"{card.engine.kind} {card.engine.precision}, tiles of {chosen.tile_size}\n{text}\nall figures: {chosen.out}")
    failed = [subject.failure for subject in comparison.subjects.values() if subject.name == OURS and subject.failure]
    if failed:
        raise PeersError(f"this project's own engine could not be measured: {failed[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
