"""Fills the table of a GPU: ``make v100-report``, which is ``python export/gpu_report.py --target v100``.

Builds the plan there, compares it with the exported network at every batch size from 1 to 16, since TensorRT's known
faults appear only at some, measures it alone, and writes ``gpu_report.md`` and ``.json`` beside the artefacts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.gate.parity import HALF, Comparison, compare
from export.gate.tiles import gather_tiles
from export.main import data_folder
from export.pipeline import ORT
from export.plan.build import build_into
from export.plan.targets import TARGETS
from unet.card import Card
from unet.engine.cpu import CpuEngine
from unet.engine.device import gpu
from unet.engine.plan import PlanRunner, benchmark, table
from unet.errors import command, say
from unet.files import atomic_file, write_json
from unet.names import HALF_FILE, ONNX_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

STEM = "gpu_report"


@dataclass(frozen=True)
class Sample:
    """Tiles of one size and what the exported files make of them on the CPU: float16 [N, 1, S - 184, S - 184] each."""

    tiles: NDArray[np.uint8]
    expected: dict[str, NDArray[np.float16]]


def samples(card: Card, data_dir: Path | None, count: int) -> list[Sample]:
    """As many tiles of each size as the largest batch, of slices that training did not see where these are known."""
    held_out = card.artefacts["saved_model"].facts.get("held_out", {})
    engines = {name: CpuEngine(card.verify(name), ORT) for name in ("onnx", "onnx_fp16")}
    found = []
    for size in card.tile_sizes:
        (few,) = gather_tiles(data_dir, (size,), held_out).batches
        tiles = np.concatenate([few] * -(-count // len(few)))[:count]
        # Turned, so that no two tiles of a batch are the same and a swapped answer is seen.
        turned = np.stack([np.rot90(tile, number // len(few), (1, 2)) for number, tile in enumerate(tiles)])
        names = {"onnx": ONNX_FILE, "onnx_fp16": HALF_FILE}
        expected = {
            names[key]: np.concatenate([engine.infer(turned[i : i + 1]) for i in range(count)])
            for key, engine in engines.items()
        }
        found.append(Sample(turned, expected))
    return found


def parity(runner: Any, found: Sequence[Sample]) -> list[Comparison]:
    """The plan against both files, at every batch size; the worst batch size of each tile size and file.

    Args:
        runner: has ``infer`` and ``max_batch_size``.
        found: what to run and what is due.
    """
    worst: list[Comparison] = []
    for sample in found:
        size = sample.tiles.shape[-1]
        by_file: dict[str, Comparison] = {}
        for batch in range(1, runner.max_batch_size + 1):
            answer = runner.infer(sample.tiles[:batch])
            for name, due in sample.expected.items():
                one = compare(f"plan, batch {batch} of {size}", name, [answer], [due[:batch]], HALF)
                if name not in by_file or one.max_difference > by_file[name].max_difference:
                    by_file[name] = one
        worst += by_file.values()
    return worst


def report(name: str, rows: Sequence[dict[str, float]], comparisons: Sequence[Comparison]) -> str:
    """The report as Markdown."""
    lines = [f"# The plan on {name}", "", table(rows)]
    lines += [
        "",
        "The plan alone, copies to and from the GPU included. Of all batch sizes the one that differs most:",
        "",
    ]
    lines += [f"- {comparison}" for comparison in comparisons]
    return "\n".join(lines) + "\n"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build, prove and measure the plan on this machine's GPU."""
    parser = argparse.ArgumentParser(
        prog="export/gpu_report.py",
        description="Build, prove and measure the TensorRT plan on the machine with the GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder that export/main.py wrote")
    parser.add_argument("--target", choices=list(TARGETS), default="v100", help="the GPU")
    parser.add_argument("--data_dir", type=Path, help="folder with the *-volume.tif to measure on")
    parser.add_argument("--seconds", type=float, default=5, help="how long to measure each batch size")
    chosen = parser.parse_args(argv)
    build_into(chosen.artefacts, chosen.target)
    card = Card.load(chosen.artefacts)
    with PlanRunner(chosen.artefacts) as runner:
        comparisons = parity(runner, samples(card, data_folder(chosen.data_dir), runner.max_batch_size))
        rows = benchmark(runner, chosen.seconds)
    text = report(gpu().name, rows, comparisons)
    with atomic_file(chosen.artefacts / f"{STEM}.md") as aside:
        aside.write_text(text, encoding="utf-8")
    proven = [comparison.as_dict() for comparison in comparisons]
    write_json(chosen.artefacts / f"{STEM}.json", {"gpu": gpu().name, "rows": rows, "parity": proven})
    say(text)
    for comparison in comparisons:
        comparison.check()
    return 0


if __name__ == "__main__":
    sys.exit(main())
