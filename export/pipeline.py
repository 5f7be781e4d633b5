"""SavedModel -> ONNX -> float16 ONNX -> engine: each is proven against those before it, and entered on the card."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from export.errors import ExportError, ParityError
from export.gate.engine_choice import choose_engine
from export.gate.half_arithmetic import HalfArithmetic
from export.gate.parity import HALF_ARITHMETIC, INTEGER, INTEGER_ASKED_FOR, LOGITS, SAME_TYPE, compare
from export.gate.proof import LARGEST_BATCH, Batch, Evidence, Step, prove
from export.gate.scoring import Judge, gather_scored
from export.gate.tiles import Source, distinct_tiles, gather_tiles, training_tiles
from export.plan.build import build_into
from export.plan.memory import plan_memory
from export.plan.settings import BuildSettings
from export.plan.trtexec import SCRIPT, write_script
from export.record.folder import sole_writer
from export.record.page import PAGE, WORST, write_card
from export.record.provenance import shell, tensorflow_package, versions
from export.steps import graph, scaling
from export.steps.bioimageio import can_package, packaged, write_package
from export.steps.half_precision import to_half
from export.steps.int8 import can_quantise, quantise
from export.steps.own_process import in_own_process
from export.steps.reference import Outputs
from export.steps.training_run import TrainingRun
from unet.card import CARD_FILE, SHORT_HASH, Card
from unet.engine import EngineError
from unet.engine.cpu import CpuEngine, EngineChoice, load_engine
from unet.files import atomic_directory
from unet.files.copies import copy_files
from unet.geometry import output_size
from unet.machine import machine
from unet.names import BIOIMAGEIO, BIOIMAGEIO_FILE, HALF, HALF_FILE, INT8, INT8_FILE, ONNX, ONNX_FILE, SAVED_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx
    from numpy.typing import NDArray

    from unet.card.records import Proof

# What goes wrong at some batch sizes does so at any tile size.
SMALL_TILE = 204


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        model_dir: folder of a training run, with ``saved_model``.
        out: folder of artefacts to write; one that holds a card is replaced.
        data_dir: folder with a ``*-volume.tif`` to measure on; None takes the default one, see `data_folder`.
        target: "cpu" chooses an engine for this machine; a GPU leaves the command that builds a plan there.
        tile_sizes: input sizes that will be served, 188 + 16k; the first is the one that speed is measured at.
        int8: whether an engine in 8-bit integers is considered too, with "cpu"; None considers it where it can be
            proven: NNCF is installed, and labels are known of slices that training did not see.
        bioimageio: whether a package for other programs is written too.
    """

    model_dir: Path
    out: Path
    data_dir: Path | None = None
    target: str = "cpu"
    tile_sizes: tuple[int, ...] = (572, 700)
    int8: bool | None = None
    bioimageio: bool = False

    def __post_init__(self) -> None:
        if not self.tile_sizes or len(set(self.tile_sizes)) != len(self.tile_sizes):
            raise ExportError("--tile_sizes needs at least one size, each once")
        if self.bioimageio and not can_package():
            raise ExportError("--bioimageio needs bioimageio.spec: pip install 'unet-medical-triton[bioimageio]'")
        for size in self.tile_sizes:
            output_size(size)
        if not (self.model_dir / SAVED_MODEL).is_dir():
            raise ExportError(
                f"{self.model_dir} has no {SAVED_MODEL}: name the --model_dir of a training run that has ended"
            )
        if self.out.exists() and not (self.out.is_dir() and self._replaceable()):
            raise ExportError(f"{self.out} holds something else than artefacts: name another folder with --out")
        if self.out.resolve() in (self.model_dir.resolve(), *self.model_dir.resolve().parents):
            raise ExportError(f"{self.out} holds --model_dir, and would be replaced: name another folder with --out")

    def _replaceable(self) -> bool:
        return (self.out / CARD_FILE).is_file() or not any(self.out.iterdir())


def export_model(config: ExportConfig, report: Callable[[str], None]) -> Card:
    """Export a trained model; the artefacts appear together, when all of them are proven.

    Args:
        config: what to export.
        report: takes each line of progress.

    Returns:
        The card of the artefacts in ``config.out``.

    Raises:
        ParityError: a step is not its parent within the tolerance; whatever was in ``config.out`` stays.
        ExportError: it cannot be exported as asked, or another process writes into ``config.out``.
    """
    started = time.monotonic()

    def say(text: str) -> None:
        report(f"[{time.monotonic() - started:5.1f} s] {text}")

    with sole_writer(config.out), atomic_directory(config.out) as aside:
        write_card(_export(config, TrainingRun.read(config.model_dir), aside, say))
    return Card.load(config.out)


def run(config: ExportConfig, report: Callable[[str], None]) -> None:
    """Export a trained model, build the plan where the target is a GPU, and list what there is.

    Raises:
        ParityError: as `export_model`, or the plan does not compute the network.
        ExportError: as `export_model`, or the plan cannot be built here; the ONNX files are there then.
    """
    card = export_model(config, report)
    if config.target != "cpu":
        try:
            build_into(config.out, config.target, report, data_dir=config.data_dir)
        except ParityError:
            raise
        except (ExportError, EngineError) as error:
            raise ExportError(
                f"the ONNX files are proven and in {config.out}, but there is no TensorRT plan: {error}; or run "
                f"{config.out / SCRIPT} with trtexec on the machine with the GPU, and adopt what it builds as it says"
            ) from error
        card = Card.load(config.out)
    for artefact in card.artefacts.values():
        report(f"{artefact.sha256[:SHORT_HASH]}  {card.folder / artefact.file}")
    report(f"{'':{SHORT_HASH}}  {card.folder / PAGE}")


def _export(config: ExportConfig, run: TrainingRun, folder: Path, say: Callable[[str], None]) -> Card:
    card = Card(folder)
    card.tile_sizes = config.tile_sizes
    saved_model = copy_files(run.saved_model, folder / SAVED_MODEL)
    card.record(SAVED_MODEL, saved_model, None, run.repeat, versions=run.versions, held_out=run.held_out)
    source = Source.of(config.data_dir, run.held_out, run.settings, run.threshold)
    evidence, reference = _gather_evidence(source, config.tile_sizes, folder, say)
    card.model = {
        "parameters": reference.parameters,
        "training": run.settings,
        **run.for_clients,
        "machine": dataclasses.asdict(machine()),
        "parity_tiles": evidence.tiles.source,
    }

    model, proof = _to_onnx(folder, evidence, reference, say)
    command = shell("python", "-m", "export.steps.to_onnx", SAVED_MODEL, ONNX_FILE)
    used = versions(tensorflow_package(), "tf2onnx", "onnx", "numpy")
    card.record(ONNX, folder / ONNX_FILE, SAVED_MODEL, command, proof=proof, versions=used)
    card.model["base_filters"] = graph.base_filters(model)
    if config.bioimageio:
        _package(card, model, evidence, say)

    try:
        _to_half(card, model, evidence, say)
    except ExportError as error:
        # A plan is made of it. An engine for a CPU computes in other formats, and takes the float32 file as well.
        if config.target != "cpu":
            raise
        (folder / HALF_FILE).unlink(missing_ok=True)
        card.model["half_refused"] = str(error)
        say(f"no {HALF_FILE}, which a CPU does not need: {error}")

    if config.target == "cpu":
        _add_engine(card, config, source, evidence, say)
    else:
        settings = BuildSettings.of(config.tile_sizes)
        card.model["plan_memory"] = plan_memory(graph.read_model(folder / HALF_FILE), settings)
        write_script(folder, settings, config.target)
    return card


def _gather_evidence(
    source: Source, tile_sizes: Sequence[int], folder: Path, say: Callable[[str], None]
) -> tuple[Evidence, Outputs]:
    """What to prove on, and what the SavedModel makes of it."""
    tiles = gather_tiles(source, tile_sizes)
    say(f"measuring on {tiles.count} tiles: {tiles.source}")
    scored = gather_scored(source, tile_sizes)
    count = len(tiles.batches)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        asked, answered = Path(name) / "tiles.npz", Path(name) / "outputs.npz"
        np.savez(asked, *tiles.batches, *(scored.tiles() if scored else []))
        in_own_process(folder, "export.steps.reference", folder / SAVED_MODEL, asked, count, answered)
        reference = Outputs.read(answered)
    say(f"{SAVED_MODEL}: {reference.parameters:,} parameters")
    judge = None
    if scored:
        judge = Judge.of(scored, scored.assemble(reference.probability[count:]), SAVED_MODEL)
        say(f"{SAVED_MODEL} on {len(scored.images)} held-out slices: {judge.before}")
    batches = [Batch(distinct_tiles(source, SMALL_TILE, LARGEST_BATCH))]
    return Evidence(tiles, {SAVED_MODEL: reference.probability[:count]}, batches, judge), reference


def _to_onnx(
    folder: Path, evidence: Evidence, reference: Outputs, say: Callable[[str], None]
) -> tuple[onnx.ModelProto, Proof]:
    path = folder / ONNX_FILE
    in_own_process(folder, "export.steps.to_onnx", folder / SAVED_MODEL, path)
    model = graph.read_model(path)
    # One tile of each size: the logits are twice as many numbers as the probabilities, and four times the bytes.
    firsts = [batch[:1] for batch in evidence.tiles.batches]
    logits = compare(ONNX, SAVED_MODEL, graph.run_logits(model, firsts), reference.first_logits, LOGITS)
    engine = CpuEngine(path, EngineChoice("onnxruntime", "f32"))
    return model, prove(
        Step(ONNX, path, engine.infer, SAME_TYPE, {SAVED_MODEL: SAME_TYPE}, others=(logits,)), evidence, say
    )


def _package(card: Card, model: onnx.ModelProto, evidence: Evidence, say: Callable[[str], None]) -> None:
    path = card.folder / BIOIMAGEIO_FILE
    judge = evidence.judge
    scores = f"On slices that training did not see: {judge.before}" if judge else "Not measured: no labels were known."
    write_package(model, evidence.tiles.batches[0][:1], card.model, path, validation=scores)
    step = Step(BIOIMAGEIO, path, packaged(path), SAME_TYPE, dict.fromkeys((SAVED_MODEL, ONNX), SAME_TYPE))
    proof, used = prove(step, evidence, say), versions("bioimageio.spec", "onnx")
    card.record(BIOIMAGEIO, path, ONNX, "python export/main.py --bioimageio", proof=proof, versions=used)


def _to_half(card: Card, model: onnx.ModelProto, evidence: Evidence, say: Callable[[str], None]) -> None:
    exact = HalfArithmetic(model, rounded=False)
    exact.infer(evidence.tiles.batches[0][:1])
    divided = scaling.factors(exact.peaks)
    for name, factor in divided.items():
        say(f"{HALF}: {name} is divided by {factor:g}, since it reaches {exact.peaks[name]:.3g}: the same function")
    path = card.folder / HALF_FILE
    graph.write_model(to_half(scaling.divided(model, divided)), path)
    rounded = HalfArithmetic(graph.read_model(path))
    proof = prove(
        Step(
            name=HALF,
            path=path,
            infer=rounded.infer,
            tolerance=HALF_ARITHMETIC,
            parents=dict.fromkeys((SAVED_MODEL, ONNX), HALF_ARITHMETIC),
            facts=lambda: {"peaks": rounded.peaks, "divided": divided},
        ),
        evidence,
        say,
    )
    layer, peak = max(((name, peak) for name, peak in rounded.peaks.items() if "/" in name), key=lambda one: one[1])
    say(f"{HALF}: the largest result of a layer is {peak:.4g} ({layer}), float16 ends at 65504")
    flags = ["--divide", *(f"{name}={factor:g}" for name, factor in divided.items())] if divided else []
    command = shell("python", "-m", "export.steps.half_precision", ONNX_FILE, HALF_FILE, *flags)
    card.record(HALF, path, ONNX, command, proof=proof, versions=versions("onnx", "numpy"))


def _add_engine(
    card: Card, config: ExportConfig, source: Source, evidence: Evidence, say: Callable[[str], None]
) -> None:
    folder = card.folder
    files = {name: folder / file for name, file in ((ONNX, ONNX_FILE), (HALF, HALF_FILE)) if name in card.artefacts}
    calibration = training_tiles(source, config.tile_sizes[0]) if config.int8 is not False else []
    if _considers_int8(config, evidence, calibration):
        files[INT8] = folder / INT8_FILE
        quantise(files[ONNX], calibration, files[INT8])
        say(f"{INT8}: calibrated on {len(calibration)} tiles of slices that training saw")
    selection = choose_engine(files, evidence, say, int8=INTEGER_ASKED_FOR if config.int8 else INTEGER)
    engine = selection.engine
    if engine.file == INT8_FILE:
        used, command = versions("nncf", "openvino"), "python export/main.py --int8"
        facts = {"calibration_tiles": len(calibration)}
        card.record(INT8, files[INT8], ONNX, command, proof=engine.proof, versions=used, **facts)
    elif INT8 in files:
        files[INT8].unlink()
    card.engine, card.fallback = engine, selection.fallback
    card.model |= {"engines_img_per_s": selection.rates, "engines_refused": selection.refused}
    table = ", ".join(f"{name} {rate:.2f}" for name, rate in selection.rates.items())
    say(f"engine: {engine.kind} {engine.precision} on {engine.file} (tiles per second: {table})")
    if evidence.judge is not None:
        difference = evidence.judge.worst_slice_png(folder / WORST, load_engine(card).infer)
        say(f"{WORST}: the slice where the engine differs most, by {difference:.1e} in the mean")


def _considers_int8(config: ExportConfig, evidence: Evidence, calibration: Sequence[NDArray[np.uint8]]) -> bool:
    """Whether to quantise, which only the scores of held-out slices can accept."""
    if config.int8 is None:
        return can_quantise() and evidence.judge is not None and len(calibration) > 0
    if config.int8 and evidence.judge is None:
        raise ExportError(
            "INT8 is accepted by the scores of labelled slices that training did not see, and there are none: "
            "train with --crossvalidation_idx, name the stacks with --data_dir, or leave --int8 out"
        )
    return config.int8
