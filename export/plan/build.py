"""Builds a TensorRT plan, proves it where it was built, and enters it on the card of the artefacts.

``python -m export.plan.build --artefacts artefacts --target v100``; with ``--adopt trtexec.plan`` it takes a plan that
``build_plan.sh`` built, and proves that.

No plan of this project has been built or run on a V100 yet.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from export.gate.half_arithmetic import HalfArithmetic
from export.gate.parity import HALF_ARITHMETIC
from export.gate.proof import Batch, Evidence, Step, one_by_one, prove
from export.gate.scoring import Judge, gather_scored
from export.gate.tiles import Source, distinct_tiles, gather_tiles
from export.plan.memory import weight_bytes
from export.plan.serialize import build_plan, inspect_plan
from export.plan.settings import BuildSettings, check_target
from export.plan.trtexec import write_script
from export.record.folder import sole_writer
from export.record.page import write_card
from export.record.provenance import shell, versions
from export.steps.graph import read_model
from unet.card import Card
from unet.card.records import gpu_device
from unet.card.signature import Signer
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.engine.device import gpu
from unet.engine.library import BuildLog, load_library
from unet.engine.plan import PlanRunner
from unet.engine.targets import TARGETS
from unet.errors import command, say
from unet.files import atomic_file
from unet.names import HALF, ONNX, PLAN, PLAN_FILE, SAVED_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unet.engine.device import Gpu
    from unet.engine.library import Library

BUILD_LOG, INSPECTION = "plan.log", "plan.json"


def build_into(
    artefacts: Path,
    target_name: str,
    report: Callable[[str], None],
    *,
    adopt: Path | None = None,
    data_dir: Path | None = None,
    settings: BuildSettings | None = None,
) -> Path:
    """Build the plan of exported artefacts for this machine's GPU, or take one, prove it, and enter it on the card.

    Args:
        artefacts: folder that export/main.py wrote; the plan, its log and TensorRT's inspection come beside the rest.
        target_name: one of `TARGETS`.
        report: takes each line of progress.
        adopt: a plan that trtexec built, instead of building one.
        data_dir: folder with a ``*-volume.tif`` to prove on; None takes the default one, see `data_folder`.
        settings: how; by default one profile for each of the card's tile sizes, and a timing cache beside the folder.

    Returns:
        The plan.

    Raises:
        CardError: the artefacts are not what their card says.
        ExportError: the build failed, its log is kept; or another process writes into the folder.
        EngineError: there is no such TensorRT or GPU, or it does not load the plan.
        ParityError: the plan does not compute the network; it is not kept.
    """
    with sole_writer(artefacts):
        card = Card.load(artefacts)
        card.verify(HALF)
        trt, device = load_library("tensorrt"), gpu()
        check_target(TARGETS[target_name], trt.__version__, device.compute_capability)
        settings = settings or BuildSettings.of(card.tile_sizes, artefacts.resolve().with_suffix(".timing"))
        started, log = time.perf_counter(), BuildLog()
        try:
            plan = _read(adopt) if adopt else build_plan(trt, card.verify(HALF), settings, log)
            inspection = inspect_plan(trt, plan, log)
        finally:
            (artefacts / BUILD_LOG).write_text(str(log), encoding="utf-8")
        report(f"{PLAN}: {'taken from ' + str(adopt) if adopt else f'built in {time.perf_counter() - started:.0f} s'}")
        words = ["python", "-m", "export.plan.build", "--artefacts", ".", "--target", target_name]
        words += ["--adopt", adopt.name] if adopt else []
        path = keep_plan(card, plan, trt, device, data_dir, shell(*words), report)
        with atomic_file(artefacts / INSPECTION) as aside:
            aside.write_text(inspection, encoding="utf-8")
        write_script(artefacts, settings, target_name)
        return path


def _read(plan: Path) -> bytes:
    try:
        return plan.read_bytes()
    except OSError as error:
        raise ExportError(f"{plan} cannot be read ({error.strerror}): name the plan that trtexec wrote") from error


def keep_plan(
    card: Card,
    plan: bytes,
    trt: Library,
    device: Gpu,
    data_dir: Path | None,
    made_by: str,
    report: Callable[[str], None],
) -> Path:
    """Prove a plan on the GPU, write it beside the artefacts that it was built from, and enter it on their card.

    Args:
        card: of the artefacts.
        plan: the serialized plan.
        trt: the library that built it.
        device: the GPU.
        data_dir: folder with a ``*-volume.tif`` to prove on; None takes the default one, see `data_folder`.
        made_by: the command that makes it.
        report: takes each line of progress.

    Returns:
        The plan.

    Raises:
        ParityError: it does not compute the network.
        EngineError: the GPU does not run it.
        ExportError: it has not a profile for each of the card's tile sizes.
        CardError: the artefacts changed meanwhile.
    """
    path = card.folder / PLAN_FILE
    held_out = card.artefacts[SAVED_MODEL].facts.get("held_out", {})
    source = Source.of(data_dir, held_out, card.model["training"], card.model.get("threshold"))
    with atomic_file(path) as aside:
        aside.write_bytes(plan)
        with PlanRunner(plan, trt) as runner:
            if set(runner.tile_sizes) != set(card.tile_sizes):
                raise ExportError(
                    f"the plan is for tiles of {list(runner.tile_sizes)}, the artefacts for {list(card.tile_sizes)}: "
                    "build it with their build_plan.sh"
                )
            evidence = gather_evidence(card, source, runner.max_batch_size)
            parents, on = dict.fromkeys((ONNX, HALF), HALF_ARITHMETIC), gpu_device(device.compute_capability)
            step = Step(PLAN, aside, runner.infer, HALF_ARITHMETIC, parents, serves=True, device=on)
            proof = prove(step, evidence, report)
            facts = plan_facts(card, runner, device)
    card.record(
        PLAN, path, HALF, made_by, proof=proof, versions=versions("pycuda") | {"tensorrt": trt.__version__}, **facts
    )
    write_card(card)
    return path


def plan_facts(card: Card, runner: PlanRunner, device: Gpu) -> dict[str, Any]:
    """What publishing must know of a plan: for which GPU and shapes it is, and what it takes of the GPU's memory."""
    return {
        "compute_capability": device.compute_capability,
        "gpu": device.name,
        "profiles": [[list(shape) for shape in profile] for profile in runner.profiles],
        "max_batch_size": runner.max_batch_size,
        "context_bytes": runner.context_bytes,
        "weight_bytes": weight_bytes(read_model(card.verify(HALF))),
    }


def gather_evidence(card: Card, source: Source, largest_batch: int) -> Evidence:
    """What a plan is proven on, and what the exported files make of it on the CPU.

    Args:
        card: of the artefacts.
        source: the stacks.
        largest_batch: of the plan.
    """
    exact = CpuEngine(card.verify(ONNX), EngineChoice("onnxruntime", "f32"))
    runs = {ONNX: exact.infer, HALF: HalfArithmetic(read_model(card.verify(HALF))).infer}
    tiles = gather_tiles(source, card.tile_sizes)
    outputs = {name: [one_by_one(infer, batch) for batch in tiles.batches] for name, infer in runs.items()}
    batches = []
    for size in card.tile_sizes:
        distinct = distinct_tiles(source, size, largest_batch)
        batches.append(Batch(distinct, {name: one_by_one(infer, distinct) for name, infer in runs.items()}))
    scored = gather_scored(source, card.tile_sizes)
    judge = Judge.of(scored, scored.predict(exact.infer), ONNX) if scored else None
    return Evidence(tiles, outputs, batches, judge)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build or adopt a plan from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m export.plan.build",
        description="Build the TensorRT plan of exported artefacts on the machine with the GPU that will run it, prove "
        "it there, and enter it on the card.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder that export/main.py wrote")
    parser.add_argument("--target", choices=list(TARGETS), default="v100", help="the GPU")
    parser.add_argument("--adopt", type=Path, help="a plan that build_plan.sh built with trtexec, instead of building")
    parser.add_argument("--data_dir", type=Path, help="folder with the *-volume.tif to prove it on")
    parser.add_argument("--sign", type=Path, metavar="KEY", help="secret minisign key: sign the folder anew")
    chosen = parser.parse_args(argv)
    signer = Signer(chosen.sign) if chosen.sign else None
    path = build_into(chosen.artefacts, chosen.target, say, adopt=chosen.adopt, data_dir=chosen.data_dir)
    if signer is not None:
        signer.sign(chosen.artefacts)
    say(f"built, proven and on the card: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
