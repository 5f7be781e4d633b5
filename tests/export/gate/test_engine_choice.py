from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.gate.engine_choice import LARGEST_BATCH, candidate, choose_engine, compare_batches, measure
from export.gate.parity import HALF, ParityError
from export.gate.tiles import Tiles
from export.steps.graph import write_model
from export.steps.reference import Reference
from unet.engine.cpu import CpuEngine, EngineChoice, supported_choices

F32 = (EngineChoice("openvino", "f32"), EngineChoice("onnxruntime", "f32"))


@pytest.fixture
def files(single: Any, half: Any, tmp_path: Path) -> tuple[Path, Path]:
    write_model(single, tmp_path / "model.onnx")
    write_model(half, tmp_path / "model.fp16.onnx")
    return tmp_path / "model.onnx", tmp_path / "model.fp16.onnx"


@pytest.fixture
def expected(files: tuple[Path, Path], reference: Reference, tiles: Tiles) -> dict[str, Any]:
    outputs = {"SavedModel": [reference.probability(batch) for batch in tiles.batches]}
    for name, path in zip(("ONNX", "FP16 ONNX"), files):
        engine = CpuEngine(path, F32[1])
        outputs[name] = [engine.infer(batch) for batch in tiles.batches]
    return outputs


def test_the_fastest_that_agrees_is_chosen(files: tuple[Path, Path], tiles: Tiles, expected: dict[str, Any]) -> None:
    found = choose_engine(*files, tiles, expected)
    engine, comparisons, rates = found.engine, found.comparisons, found.rates
    assert found.changes == []
    # The chosen one at every batch size too, the worst of which is told.
    by_batch = comparisons.pop()
    assert by_batch.step.startswith(f"{engine.kind} {engine.precision}, batch ")
    assert by_batch.accepted
    accepted = {c.step for c in comparisons if c.accepted} - {c.step for c in comparisons if not c.accepted}
    assert {str(choice) for choice in F32} <= accepted == set(rates)
    assert max(rates, key=lambda name: rates[name]) == f"{engine.kind} {engine.precision}"
    assert engine.img_per_s == max(rates.values()) > 0
    assert engine.file == ("model.onnx" if engine.kind == "onnxruntime" else "model.fp16.onnx")
    assert {c.step for c in comparisons} == {str(choice) for choice in supported_choices()}
    assert {c.against for c in comparisons if c.step == "onnxruntime f32"} == {"SavedModel", "ONNX"}
    assert {c.against for c in comparisons if c.step == "openvino f32"} == {"SavedModel", "FP16 ONNX"}


def test_an_engine_that_does_not_agree_is_left_out_however_fast(
    files: tuple[Path, Path],
    half: Any,
    tiles: Tiles,
    expected: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    change_constant: Any,
) -> None:
    wrong = copy.deepcopy(half)
    change_constant(wrong, "up0_conv2/Conv.1", lambda w: w * np.float16(1.5))
    write_model(wrong, files[1])
    found = choose_engine(*files, tiles, expected, F32)
    engine, comparisons, rates = found.engine, found.comparisons, found.rates
    assert (engine.kind, engine.file) == ("onnxruntime", "model.onnx")
    assert list(rates) == ["onnxruntime f32"]
    assert [c.accepted for c in comparisons if c.step == "openvino f32"] == [False]
    assert "openvino f32 is not used" in caplog.text


def test_where_none_agrees_the_figure_is_named(
    files: tuple[Path, Path], half: Any, tiles: Tiles, expected: dict[str, Any], change_constant: Any
) -> None:
    wrong = copy.deepcopy(half)
    change_constant(wrong, "up0_conv2/Conv.1", lambda w: w * np.float16(1.5))
    write_model(wrong, files[1])
    with pytest.raises(ParityError, match=r"no engine for this CPU agrees .* is the most accepted"):
        choose_engine(*files, tiles, expected, F32[:1])


def test_an_engine_that_cannot_load_is_left_out(files: tuple[Path, Path], tiles: Tiles, expected: Any) -> None:
    files[1].write_bytes(b"garbage")
    found = choose_engine(*files, tiles, expected, F32)
    assert (found.engine.kind, list(found.rates)) == ("onnxruntime", ["onnxruntime f32"])


def test_more_work_is_measured_to_be_slower(files: tuple[Path, Path], tiles: Tiles) -> None:
    engines = {F32[1]: CpuEngine(files[0], F32[1], threads=1)}
    small = measure(engines, tiles)[F32[1]]
    large = measure(engines, Tiles("", (np.zeros((1, 1, 700, 700), np.uint8),)))[F32[1]]
    assert small > 3 * large


class Misordered(CpuEngine):
    """From some batch size on its answers are those of the tiles in another order."""

    def __init__(self, path: Path, choice: EngineChoice, first_wrong: int) -> None:
        super().__init__(path, choice)
        self._first_wrong = first_wrong

    def infer(self, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        answers = super().infer(image)
        return answers if len(image) < self._first_wrong else np.roll(answers, 1, axis=0)


@pytest.mark.parametrize("choice", F32, ids=str)
def test_answers_that_go_wrong_from_some_batch_size_on_are_refused(
    files: tuple[Path, Path], choice: EngineChoice
) -> None:
    path, name = candidate(choice, *files).path, str(choice)
    compare_batches(Misordered(path, choice, LARGEST_BATCH + 1), name, HALF).check()
    with pytest.raises(ParityError) as caught:
        compare_batches(Misordered(path, choice, 8), name, HALF).check()
    pattern = rf"{name}, batch (\d+) does not agree with one by one: its probabilities differ by \S+, 5e-03 is the most"
    sentence = re.match(pattern, str(caught.value))
    assert sentence is not None
    assert 8 <= int(sentence[1]) <= LARGEST_BATCH
