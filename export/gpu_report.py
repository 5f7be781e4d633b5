"""Fills the table of a GPU: ``make v100-report``, which is ``python export/gpu_report.py --target v100``.

Builds the plan there, or adopts one that trtexec built, proves it as `export.plan.build` does, measures it alone, and
writes ``gpu_report.md`` and ``.json`` beside the artefacts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from export.plan.build import build_into
from unet.card import Card
from unet.engine import EngineError
from unet.engine.device import gpu
from unet.engine.plan import PlanRunner, benchmark, table
from unet.engine.targets import TARGETS
from unet.errors import command, say
from unet.files import atomic_file, write_json
from unet.files.demo import own_or_demo
from unet.machine import run_tool
from unet.names import PLAN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unet.card.records import Proof

STEM = "gpu_report"


def report(name: str, rows: Sequence[dict[str, float]], proof: Proof) -> str:
    """The report as Markdown."""
    lines = [f"# The plan on {name}", "", table(rows)]
    lines += ["", "The plan alone, copies to and from the GPU included. Its proof, the worst of each figure:", ""]
    lines += [
        f"- {row['step']} against {row['against']}: {row['quantity']} within {row['max_difference']:.1e} "
        f"(accepted: {row['max_accepted']:.0e}), {row['flipped_share']:.1e} of the pixels flipped"
        for row in proof.comparisons
    ]
    return "\n".join(lines) + "\n"


def _check(artefacts: Path) -> None:
    """Refuse where nothing can be measured, before TensorRT is installed for it.

    Raises:
        CardError: no artefacts.
        EngineError: no GPU, or no driver.
    """
    Card.load(artefacts)
    if run_tool("nvidia-smi", "--list-gpus") is None:
        raise EngineError("no NVIDIA GPU answers (nvidia-smi): run this on the machine with the GPU")


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
    parser.add_argument("--adopt", type=Path, help="a plan that build_plan.sh built with trtexec, instead of building")
    parser.add_argument("--data_dir", type=Path, help="folder with the *-volume.tif to prove it on")
    parser.add_argument("--seconds", type=float, default=5, help="how long to measure each batch size")
    parser.add_argument("--check", action="store_true", help="only look whether artefacts and a GPU are there")
    chosen = parser.parse_args(argv)
    artefacts = own_or_demo(chosen.artefacts, "artefacts")
    if chosen.check:
        _check(artefacts)
        return 0
    build_into(artefacts, chosen.target, say, adopt=chosen.adopt, data_dir=chosen.data_dir)
    proof = Card.load(artefacts).artefacts[PLAN].proof
    assert proof is not None, "the card takes no plan without one"
    with PlanRunner.load(artefacts) as runner:
        rows = benchmark(runner, chosen.seconds)
    text = report(gpu().name, rows, proof)
    with atomic_file(artefacts / f"{STEM}.md") as aside:
        aside.write_text(text, encoding="utf-8")
    write_json(artefacts / f"{STEM}.json", {"gpu": gpu().name, "rows": rows, "proof": asdict(proof)})
    say(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
