"""The engine for this machine's CPU: among those that agree with the network, the one measured to be fastest."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from export.gate.parity import BFLOAT, HALF, INTEGER, SAME_TYPE, Comparison, ParityError, Tolerance, compare
from unet.card import Engine
from unet.engine.cpu import CpuEngine, EngineChoice, EngineError, supported_choices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

    from export.gate.scoring import Change, Judge
    from export.gate.tiles import Tiles

# Each engine has at least 3 turns, then turns go on up to these.
ROUNDS, SECONDS = 9, 12.0
UNTIMED = 2
LARGEST_BATCH, SMALL_TILE = 16, 204
SAVED_MODEL_NAME, SINGLE_NAME, HALF_NAME = "SavedModel", "ONNX", "FP16 ONNX"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """An engine to consider: the file that it loads, that file's name among the outputs, and what it may change."""

    choice: EngineChoice
    path: Path
    parent: str
    tolerance: Tolerance


@dataclass(frozen=True)
class Selection:
    """The engine that was chosen, and why.

    Attributes:
        comparisons: of every engine, tile by tile.
        changes: of every engine, in scores of held-out slices, where there are any.
        rates: tiles of the first size per second, one at a time, of those that agree.
    """

    engine: Engine
    comparisons: list[Comparison]
    changes: list[Change]
    rates: dict[str, float]


def candidate(choice: EngineChoice, single: Path, half: Path, int8: Path | None = None) -> Candidate:
    """The file that suits an engine, and how far its output may be from the SavedModel's.

    OpenVINO converts float16 weights while loading, so it takes the smaller file; ONNX Runtime would put casts
    around every operator of a float16 graph on a CPU, so it takes the float32 one.
    """
    if choice.precision == "int8":
        if int8 is None:
            raise EngineError("there is no INT8 file: export with --int8")
        return Candidate(choice, int8, SINGLE_NAME, INTEGER)
    if choice.kind == "onnxruntime":
        return Candidate(choice, single, SINGLE_NAME, SAME_TYPE)
    return Candidate(choice, half, HALF_NAME, BFLOAT if choice.precision == "bf16" else HALF)


def choose_engine(
    single: Path,
    half: Path,
    tiles: Tiles,
    expected: Mapping[str, Sequence[NDArray[Any]]],
    choices: Sequence[EngineChoice] | None = None,
    judge: Judge | None = None,
    int8: Path | None = None,
) -> Selection:
    """Load, prove and time every engine that this CPU supports.

    Args:
        single: the float32 ONNX file.
        half: the float16 one, in the same folder.
        tiles: what to run on.
        expected: probability by what gave it: of the SavedModel and of both files.
        choices: engines to consider; None for all that this CPU supports.
        judge: scores held-out slices, where there are any.
        int8: the quantised network, which is considered first where it is given.

    Returns:
        The fastest that agrees, and what was measured of all.

    Raises:
        ParityError: none agrees; with the figure of the last.
    """
    engines: dict[EngineChoice, CpuEngine] = {}
    comparisons: list[Comparison] = []
    changes: list[Change] = []
    fault = "there was none to try"
    considered = [*([] if int8 is None else [EngineChoice("openvino", "int8")]), *(choices or supported_choices())]
    candidates = {choice: candidate(choice, single, half, int8) for choice in considered}
    for choice, entry in candidates.items():
        try:
            engine = CpuEngine(entry.path, choice)
            found = [one_by_one(engine, batch) for batch in tiles.batches]
            for name in (SAVED_MODEL_NAME, entry.parent):
                comparisons.append(compare(str(choice), name, found, expected[name], entry.tolerance))
                comparisons[-1].check()
        except (EngineError, ParityError) as error:
            log.warning("%s is not used: %s", choice, error)
            fault = str(error)
            continue
        engines[choice] = engine
    rates = measure(engines, tiles)
    for choice in sorted(rates, key=lambda one: -rates[one]):
        try:
            comparisons.append(compare_batches(engines[choice], str(choice), candidates[choice].tolerance).check())
            if judge is not None:
                changes.append(
                    judge.judge(str(choice), engines[choice].infer, candidates[choice].tolerance.score_ratio)
                )
                changes[-1].check()
        except ParityError as error:
            log.warning("%s is not used: %s", choice, error)
            fault = str(error)
            continue
        chosen = Engine(choice.kind, choice.precision, candidates[choice].path.name, round(rates[choice], 3))
        return Selection(chosen, comparisons, changes, {str(one): round(rate, 3) for one, rate in rates.items()})
    raise ParityError(f"no engine for this CPU agrees with the network; the last: {fault}")


def one_by_one(engine: CpuEngine, batch: NDArray[np.uint8]) -> NDArray[np.float16]:
    """The outputs of a batch whose tiles are run singly: the memory is that of one."""
    return np.concatenate([engine.infer(batch[index : index + 1]) for index in range(len(batch))])


def compare_batches(engine: CpuEngine, name: str, tolerance: Tolerance) -> Comparison:
    """Tiles in batches of 1 to 16 against the same tiles one by one; the batch size that differs most.

    Small tiles of noise do: what goes wrong at some batch sizes does so at any tile size.
    """
    noise = np.random.default_rng(0).integers(0, 256, (LARGEST_BATCH, 1, SMALL_TILE, SMALL_TILE), np.uint8)
    expected = one_by_one(engine, noise)
    found = (
        compare(f"{name}, batch {size}", "one by one", [engine.infer(noise[:size])], [expected[:size]], tolerance)
        for size in range(1, LARGEST_BATCH + 1)
    )
    return max(found, key=lambda comparison: comparison.max_difference)


def measure(engines: Mapping[EngineChoice, CpuEngine], tiles: Tiles) -> dict[EngineChoice, float]:
    """Tiles of the first size per second, one at a time: the median of rounds in which each engine has its turn.

    Turns make them share whatever else the machine does meanwhile. A turn's first two passes are not timed: they
    find the caches full of another engine's weights, and ONNX Runtime's threads still spinning.
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
