"""SavedModel -> ONNX -> float16 ONNX -> engine: each step proven against those before it, and entered on the card."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.gate.engine_choice import HALF_NAME, SAVED_MODEL_NAME, SINGLE_NAME, choose_engine, one_by_one
from export.gate.parity import HALF, SAME_TYPE, Comparison, Tolerance, compare
from export.gate.parity import LOGITS as LOGITS_TOLERANCE
from export.gate.scoring import Change, Judge, gather_scored
from export.gate.tiles import Tiles, gather_tiles, training_tiles
from export.plan import trtexec
from export.provenance import shell, tensorflow_package, versions, write_card
from export.steps.graph import LOGITS, base_filters, read_model, with_logits, write_model
from export.steps.half_precision import to_half
from export.steps.int8 import quantise
from export.steps.reference import Outputs
from unet.card import CARD_FILE, Card
from unet.engine.cpu import CpuEngine, EngineChoice, load_engine
from unet.errors import UnetError
from unet.files import atomic_directory
from unet.geometry import output_size
from unet.intensity import WindowChoice, parse_window
from unet.machine import machine, thread_limit
from unet.names import HALF_FILE, INPUT, INT8_FILE, ONNX_FILE, SAVED_MODEL
from unet.processes import child
from unet.volume import LabelOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import onnx
    from numpy.typing import NDArray

WORST = "worst_slice.png"
ORT = EngineChoice("onnxruntime", "f32")


class ExportError(UnetError):
    """An export that cannot be done as asked."""


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how.

    Attributes:
        model_dir: folder of a training run, with ``saved_model``.
        out: folder of artefacts to write; one that holds a card is replaced.
        data_dir: folder with a ``*-volume.tif`` to measure on; None takes the synthetic stack.
        target: "cpu" chooses an engine for this machine; a GPU leaves the command that builds a plan there.
        tile_sizes: input sizes that will be served, 188 + 16k; the first is the one that speed is measured at.
        int8: whether an engine in 8-bit integers is considered too, with "cpu".
    """

    model_dir: Path
    out: Path
    data_dir: Path | None = None
    target: str = "cpu"
    tile_sizes: tuple[int, ...] = (572, 700)
    int8: bool = False

    def __post_init__(self) -> None:
        if not self.tile_sizes or len(set(self.tile_sizes)) != len(self.tile_sizes):
            raise ExportError("--tile_sizes needs at least one size, each once")
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


class Exporter:
    """One export into a folder that is not yet under its final name."""

    def __init__(self, config: ExportConfig, folder: Path, report: Callable[[str], None]) -> None:
        self.config = config
        self.card = Card(folder)
        self.folder = folder
        self.report = report
        self.expected: dict[str, list[NDArray[Any]]] = {}
        self._judge: Judge | None = None
        self._changes: list[dict[str, Any]] = []
        self._window: WindowChoice = None
        self._started = time.monotonic()

    def run(self) -> None:
        """Every step, each of which raises where it is not its parent within the tolerance."""
        run_config = _read_run_config(self.config.model_dir)
        self.card.tile_sizes = self.config.tile_sizes
        held_out, settings = run_config.get("held_out", {}), run_config.get("settings", {})
        self._window = parse_window(str(settings.get("window", "")).split())
        tiles = gather_tiles(self.config.data_dir, self.config.tile_sizes, held_out, self._window)
        self._say(f"measuring on {tiles.count} tiles: {tiles.source}")
        scored = gather_scored(
            self.config.data_dir, self.config.tile_sizes, held_out, LabelOptions.of(settings), self._window
        )
        saved_model = self._copy_saved_model(run_config)
        reference = self._run_saved_model(saved_model, [*tiles.batches, *(scored.tiles() if scored else [])])
        self.expected[SAVED_MODEL_NAME] = reference.probability[: len(tiles.batches)]
        if scored:
            self._judge = Judge.of(scored, scored.assemble(reference.probability[len(tiles.batches) :]))
            self._say(f"SavedModel on {len(scored.images)} held-out slices: {self._judge.before}")
        self._say(f"SavedModel: {reference.parameters:,} parameters")
        model = self._to_onnx(reference, tiles)
        self.card.model = {
            "base_filters": base_filters(model),
            "parameters": reference.parameters,
            "training": run_config.get("settings", {}),
            "machine": asdict(machine()),
            "parity_tiles": tiles.source,
            "scores": self._changes,
        }
        self._to_half(model, tiles)
        if self.config.target == "cpu":
            self._choose_engine(tiles)
        else:
            trtexec.write_script(self.folder, HALF_FILE, self.config.tile_sizes)
        write_card(self.card)

    def _copy_saved_model(self, run_config: dict[str, Any]) -> Path:
        path = self.folder / SAVED_MODEL
        shutil.copytree(self.config.model_dir / SAVED_MODEL, path)
        repeat = str(run_config.get("repeat", shell("python", "train/main.py", "--model_dir", self.config.model_dir)))
        made_with = run_config.get("versions", {})
        self.card.record("saved_model", path, None, repeat, versions=made_with, held_out=run_config.get("held_out", {}))
        return path

    def _run_saved_model(self, saved_model: Path, batches: Sequence[NDArray[np.uint8]]) -> Outputs:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            asked, answered = Path(name) / "tiles.npz", Path(name) / "outputs.npz"
            np.savez(asked, *batches)
            self._in_own_process("export.steps.reference", saved_model, asked, answered)
            return Outputs.read(answered)

    def _in_own_process(self, module: str, *arguments: Path) -> None:
        """Run a step that needs TensorFlow, which gives its gigabytes back to the system only when it ends.

        Raises:
            ExportError: with the step's own last words.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            log = Path(name) / "log"
            with child([sys.executable, "-m", module, *map(str, arguments)], log=log) as process:
                process.wait()
            said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if process.returncode != 0:
            last = said[-1] if said else f"it ended with exit code {process.returncode}"
            raise ExportError(last[len("error: ") :] if last.startswith("error: ") else f"{module} failed: {last}")

    def _to_onnx(self, reference: Outputs, tiles: Tiles) -> onnx.ModelProto:
        path = self.folder / ONNX_FILE
        self._in_own_process("export.steps.to_onnx", self.folder / SAVED_MODEL, path)
        model = read_model(path)
        command = shell("python", "-m", "export.steps.to_onnx", SAVED_MODEL, ONNX_FILE)
        used = versions(tensorflow_package(), "tf2onnx", "onnx", "numpy")
        self.card.record("onnx", path, "saved_model", command, versions=used)
        # One tile of each size: the logits are as many as the probabilities are not.
        firsts = [batch[:1] for batch in tiles.batches]
        found = _run_logits(model, firsts)
        expected = reference.first_logits[: len(firsts)]
        self._prove(compare(SINGLE_NAME, SAVED_MODEL_NAME, found, expected, LOGITS_TOLERANCE))
        self._prove_file(SINGLE_NAME, path, tiles, SAME_TYPE)
        return model

    def _to_half(self, model: onnx.ModelProto, tiles: Tiles) -> None:
        path = self.folder / HALF_FILE
        write_model(to_half(model), path)
        command = shell("python", "-m", "export.steps.half_precision", ONNX_FILE, HALF_FILE)
        self.card.record("onnx_fp16", path, "onnx", command, versions=versions("onnx", "numpy"))
        self._prove_file(HALF_NAME, path, tiles, HALF)

    def _to_int8(self, single: Path) -> Path:
        if self._judge is None:
            raise ExportError(
                "INT8 is accepted by the scores of labelled slices that training did not see, and there are none: "
                "train with --crossvalidation_idx, name the stacks with --data_dir, or leave --int8 out"
            )
        held_out = self.card.artefacts["saved_model"].facts["held_out"]
        path = self.folder / INT8_FILE
        calibration = training_tiles(self.config.data_dir, self.config.tile_sizes[0], held_out, self._window)
        quantise(single, calibration, path)
        self.card.record(
            "int8",
            path,
            "onnx",
            "python export/main.py --int8",
            versions=versions("nncf", "openvino"),
            calibration_tiles=len(calibration),
        )
        self._say(f"INT8: calibrated on {len(calibration)} tiles of slices that training saw")
        return path

    def _prove_file(self, name: str, path: Path, tiles: Tiles, tolerance: Tolerance) -> None:
        """Run a file as it lies on the disk and compare it with every step before it."""
        engine = CpuEngine(path, ORT)
        found = [one_by_one(engine, batch) for batch in tiles.batches]
        for against, values in self.expected.items():
            self._prove(compare(name, against, found, values, tolerance))
        self.expected[name] = found
        if self._judge is not None:
            self._prove(self._judge.judge(name, engine.infer, tolerance.score_ratio))

    def _choose_engine(self, tiles: Tiles) -> None:
        single, half = self.folder / ONNX_FILE, self.folder / HALF_FILE
        int8 = self._to_int8(single) if self.config.int8 else None
        selection = choose_engine(single, half, tiles, self.expected, judge=self._judge, int8=int8)
        for comparison in selection.comparisons:
            self._note(comparison)
        for change in selection.changes:
            self._note(change)
        self.card.engine = engine = selection.engine
        self.card.model["engines_img_per_s"] = selection.rates
        table = ", ".join(f"{name} {rate:.2f}" for name, rate in selection.rates.items())
        self._say(f"engine: {engine.kind} {engine.precision} on {engine.file} (tiles per second: {table})")
        if self._judge is not None:
            difference = self._judge.worst_slice_png(self.folder / WORST, load_engine(self.card).infer)
            self._say(f"{WORST}: the slice where the engine differs most, by {difference:.1e} in the mean")

    def _prove(self, result: Comparison | Change) -> None:
        self._note(result)
        result.check()

    def _note(self, result: Comparison | Change) -> None:
        (self._changes if isinstance(result, Change) else self.card.parity).append(result.as_dict())
        self._say(str(result))

    def _say(self, text: str) -> None:
        self.report(f"[{time.monotonic() - self._started:5.1f} s] {text}")


def export_model(config: ExportConfig, report: Callable[[str], None]) -> Card:
    """Export a trained model; the artefacts appear together, when all of them are proven.

    Args:
        config: what to export.
        report: takes each line of progress.

    Returns:
        The card of the artefacts in ``config.out``.

    Raises:
        ParityError: a step is not its parent within the tolerance; whatever was in ``config.out`` stays.
        UnetError: one of the others that name what cannot be used.
    """
    with atomic_directory(config.out) as aside:
        Exporter(config, aside, report).run()
    return Card.load(config.out)


def _run_logits(model: onnx.ModelProto, batches: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.float32]]:
    import onnxruntime

    content = with_logits(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = thread_limit() or 0
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return [session.run([LOGITS], {INPUT: batch})[0] for batch in batches]


def _read_run_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{path} is not JSON ({error}): take it from the training run again") from error
    if not isinstance(values, dict):
        raise ExportError(f"{path} is not the configuration of a training run: take it from the run again")
    return values
