"""The engine for this machine's CPU: the fastest that is proven, and one in float32 for any other CPU."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from export.errors import ParityError
from export.gate.parity import BFLOAT, HALF_ARITHMETIC, HALF_WEIGHTS, INTEGER, SAME_TYPE, Tolerance
from export.gate.proof import Evidence, Step, prove
from unet.card.records import Engine
from unet.engine import EngineError
from unet.engine.cpu import CpuEngine, EngineChoice, supported_choices
from unet.errors import warn
from unet.names import HALF, INT8, ONNX, SAVED_MODEL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from export.gate.proof import Note
    from export.gate.tiles import Tiles

# Each engine has at least 3 turns. More follow until one of these limits is reached.
ROUNDS, SECONDS = 9, 12.0
UNTIMED = 2
INT8_CHOICE = EngineChoice("openvino", "int8")
# OpenVINO converts float16 weights while loading, so it takes the smaller file; ONNX Runtime would put casts around
# every operator of a float16 graph on a CPU, so it takes the float32 one.
FILE_OF = {"openvino": HALF, "onnxruntime": ONNX}


@dataclass(frozen=True)
class Selection:
    """The engine that was chosen, and why.

    Attributes:
        engine: the fastest that is proven.
        fallback: the fastest in float32 that is proven.
        rates: tiles of the first size per second, one at a time, of every engine that loads.
        refused: why an engine that is faster, or does not load, is not taken.
    """

    engine: Engine
    fallback: Engine
    rates: dict[str, float]
    refused: dict[str, str] = field(default_factory=dict)


def choose_engine(
    files: Mapping[str, Path],
    evidence: Evidence,
    note: Note,
    choices: Sequence[EngineChoice] | None = None,
    *,
    int8: Tolerance = INTEGER,
) -> Selection:
    """Load and time every engine that this CPU supports, then prove them from the fastest on.

    Args:
        files: of the proven artefacts by name, and of the quantised network where there is one.
        evidence: what to prove on, with the outputs of the artefacts.
        note: takes each result in words.
        choices: engines to consider beside INT8; None for all that this CPU supports.
        int8: how far INT8 may be from the SavedModel.

    Returns:
        The fastest that is proven, which INT8 may be, and the fastest of those in float32.

    Raises:
        ParityError: none is proven; with the figure of the last.
    """
    considered = [*([INT8_CHOICE] if INT8 in files else []), *(choices or supported_choices())]
    engines: dict[EngineChoice, CpuEngine] = {}
    refused: dict[str, str] = {}
    for choice in considered:
        try:
            engines[choice] = CpuEngine(files[_artefact(choice, files)], choice)
        except EngineError as error:
            _refuse(choice, error, refused)
    rates = measure(engines, evidence.tiles)
    proven: list[Engine] = []
    for choice in sorted(rates, key=lambda one: -rates[one]):
        if proven and choice.precision != "f32":
            continue
        try:
            proof = prove(_step(choice, engines[choice], _artefact(choice, files), int8), evidence, note)
        except (EngineError, ParityError) as error:
            _refuse(choice, error, refused)
            continue
        path = engines[choice].model_path
        proven.append(Engine(choice.kind, choice.precision, path.name, round(rates[choice], 3), proof))
        if choice.precision == "f32":
            return Selection(proven[0], proven[-1], {str(one): round(rate, 3) for one, rate in rates.items()}, refused)
    last = list(refused.values())[-1] if refused else "there was none to try"
    raise ParityError(f"no engine in float32 for this CPU computes the network; the last: {last}")


def _artefact(choice: EngineChoice, files: Mapping[str, Path]) -> str:
    """What an engine loads; the float32 network where there is none in float16."""
    wanted = INT8 if choice.precision == "int8" else FILE_OF[choice.kind]
    return wanted if wanted in files else ONNX


def _step(choice: EngineChoice, engine: CpuEngine, artefact: str, int8: Tolerance) -> Step:
    tolerance = int8 if choice.precision == "int8" else tolerance_of(choice)
    parents = {SAVED_MODEL: tolerance, ONNX: tolerance}
    if artefact == HALF:
        # Its outputs are those of float16 arithmetic, which an engine in float32 does not have.
        parents = {SAVED_MODEL: tolerance, HALF: BFLOAT if choice.precision == "bf16" else HALF_ARITHMETIC}
    return Step(str(choice), engine.model_path, engine.infer, tolerance, parents, serves=True)


def tolerance_of(choice: EngineChoice) -> Tolerance:
    """How far the output of an engine in floating point may be from the SavedModel's."""
    if choice.kind == "onnxruntime":
        return SAME_TYPE
    return BFLOAT if choice.precision == "bf16" else HALF_WEIGHTS


def _refuse(choice: EngineChoice, error: Exception, refused: dict[str, str]) -> None:
    refused[str(choice)] = str(error)
    warn(f"{choice} is not used: {error}")


def measure(engines: Mapping[EngineChoice, CpuEngine], tiles: Tiles) -> dict[EngineChoice, float]:
    """Tiles of the first size per second, one at a time: the median of rounds in which each engine has its turn.

    In turns, all engines suffer alike from what else the machine does. The first two passes of a turn are not timed:
    the caches hold another engine's weights then, and ONNX Runtime's threads may still spin.
    """
    tile = tiles.batches[0][:1]
    times: dict[EngineChoice, list[float]] = {choice: [] for choice in engines}
    started = time.perf_counter()
    for number in range(ROUNDS):
        if number >= 3 and time.perf_counter() - started > SECONDS:
            break
        for choice, engine in engines.items():
            for _ in range(UNTIMED):
                engine.infer(tile)
            begun = time.perf_counter()
            engine.infer(tile)
            times[choice].append(time.perf_counter() - begun)
    return {choice: 1 / statistics.median(values) for choice, values in times.items()}
