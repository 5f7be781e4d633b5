from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ParityError
from export.gate.parity import BFLOAT, HALF_ARITHMETIC, HALF_WEIGHTS, INTEGER, compare
from export.gate.proof import LARGEST_BATCH, ONE_BY_ONE, Batch, Evidence, Step, every_batch, prove
from export.gate.tiles import Source, Tiles, distinct_tiles
from export.steps.graph import write_model
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.files import sha256_of
from unet.machine import instruction_sets

F32 = (EngineChoice("openvino", "f32"), EngineChoice("onnxruntime", "f32"))


@pytest.fixture(scope="module")
def batch(data_dir: Path) -> Batch:
    return Batch(distinct_tiles(Source(data_dir), 204, LARGEST_BATCH))


@pytest.fixture(scope="module")
def engine(half: Any, tmp_path_factory: pytest.TempPathFactory) -> CpuEngine:
    path = tmp_path_factory.mktemp("proof") / "model.fp16.onnx"
    write_model(half, path)
    return CpuEngine(path, F32[0])


def wrong(engine: CpuEngine, change: Callable[[Any], Any], sizes: range) -> Callable[[Any], Any]:
    """The engine, but at some batch sizes its answers are changed, as TensorRT's have been."""
    return lambda image: change(engine.infer(image)) if len(image) in sizes else engine.infer(image)


def step(engine: CpuEngine, infer: Any = None, tolerance: Any = HALF_WEIGHTS, **more: Any) -> Step:
    return Step("openvino f32", engine.model_path, infer or engine.infer, tolerance, {}, serves=True, **more)


@pytest.mark.parametrize("choice", F32, ids=str)
def test_every_batch_size_gives_the_answers_of_single_tiles(engine: CpuEngine, batch: Batch, choice: Any) -> None:
    (found,) = every_batch(step(CpuEngine(engine.model_path, choice)), batch)
    assert (found.step, found.against) == ("openvino f32, batches of 1 to 16 tiles of 204", ONE_BY_ONE)
    assert found.max_difference <= 2**-11


def swap_two(answers: Any) -> Any:
    return answers[[*range(len(answers) - 2), -1, -2]] if len(answers) > 1 else answers


@pytest.mark.parametrize("size", [2, 8, 16])
def test_two_swapped_answers_are_refused_at_whatever_tolerance(engine: CpuEngine, batch: Batch, size: int) -> None:
    infer = wrong(engine, swap_two, range(size, size + 1))
    with pytest.raises(ParityError, match=rf"openvino f32, batch of {size} tiles of 204 "):
        every_batch(step(engine, infer), batch)
    blind = step(engine, infer, INTEGER)
    with pytest.raises(ParityError, match=rf"batch of {size} tiles of 204 (answers tile|does not agree)"):
        every_batch(blind, batch)


def test_the_worst_of_each_figure_counts_though_it_is_of_another_size(engine: CpuEngine, batch: Batch) -> None:
    due = np.concatenate([engine.infer(tile[None]) for tile in batch.tiles])
    near = (due > 0.499) & (due < 0.501)
    assert near.any()

    def infer(image: Any) -> Any:
        answer = engine.infer(image).copy()
        if len(image) == 3:
            answer[0, 0, 0, 0] += np.float16(0.02)
        if len(image) == 5:
            answer = np.where(np.abs(answer - 0.5) < 0.002, 1 - answer, answer)
        return answer

    (found,) = every_batch(step(engine, infer, BFLOAT), batch)
    of_three = compare("", "", [infer(batch.tiles[:3])], [due[:3]], BFLOAT)
    of_five = compare("", "", [infer(batch.tiles[:5])], [due[:5]], BFLOAT)
    assert of_three.max_difference > of_five.max_difference > 0
    assert of_five.flipped_share > of_three.flipped_share
    assert (found.max_difference, found.flipped_share) == (of_three.max_difference, of_five.flipped_share)


def test_a_batch_is_compared_with_what_is_due_where_that_is_known(engine: CpuEngine, batch: Batch) -> None:
    due = np.concatenate([engine.infer(tile[None]) for tile in batch.tiles])
    known = Batch(batch.tiles, {"onnx": due, "onnx_fp16": due})
    assert [one.against for one in every_batch(step(engine), known)] == ["onnx", "onnx_fp16"]
    shifted = Batch(batch.tiles, {"onnx": due, "onnx_fp16": due[::-1]})
    with pytest.raises(ParityError, match="batch of 1 tiles of 204 does not agree with onnx_fp16"):
        every_batch(step(engine), shifted)


def test_a_proof_is_of_the_file_the_device_and_the_instructions(engine: CpuEngine, tiles: Tiles, batch: Batch) -> None:
    due = [engine.infer(one) for one in tiles.batches]
    evidence = Evidence(tiles, {"onnx": due}, [batch])
    said: list[str] = []
    whole = Step(
        "onnx_fp16",
        engine.model_path,
        engine.infer,
        HALF_ARITHMETIC,
        {"onnx": HALF_ARITHMETIC},
        serves=True,
        device="gpu 7.0",
        facts=lambda: {"peaks": {"down0_conv1/Conv": 3.5}},
    )
    proof = prove(whole, evidence, said.append)
    assert (proof.sha256, proof.device) == (sha256_of(engine.model_path), "gpu 7.0")
    assert proof.instructions == instruction_sets()
    assert [row["against"] for row in proof.comparisons] == ["onnx", ONE_BY_ONE]
    assert proof.facts == {"peaks": {"down0_conv1/Conv": 3.5}}
    assert evidence.outputs.keys() == {"onnx", "onnx_fp16"}
    assert len(said) == 2


def test_only_the_gate_makes_proofs(project_root: Path) -> None:
    makers = set()
    for path in [*project_root.glob("export/**/*.py"), *project_root.glob("serve/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Proof":
                makers.add(path.relative_to(project_root).as_posix())
    assert makers == {"export/gate/proof.py"}
