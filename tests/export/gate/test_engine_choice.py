from __future__ import annotations

import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ParityError
from export.gate.engine_choice import choose_engine, measure
from export.gate.half_arithmetic import HalfArithmetic
from export.gate.proof import Evidence
from export.gate.tiles import Source, Tiles, gather_tiles
from export.steps.graph import write_model
from export.steps.reference import Reference
from unet import errors
from unet.engine.cpu import CpuEngine, EngineChoice, supported_choices
from unet.machine import instruction_sets

F32 = (EngineChoice("openvino", "f32"), EngineChoice("onnxruntime", "f32"))
Files = dict[str, Path]


@pytest.fixture
def files(single: Any, half: Any, tmp_path: Path) -> Files:
    write_model(single, tmp_path / "model.onnx")
    write_model(half, tmp_path / "model.fp16.onnx")
    return {"onnx": tmp_path / "model.onnx", "onnx_fp16": tmp_path / "model.fp16.onnx"}


@pytest.fixture(scope="module")
def outputs(half: Any, reference: Reference, tiles: Tiles) -> dict[str, Any]:
    due = [reference.probability(batch) for batch in tiles.batches]
    rounded = [HalfArithmetic(half).infer(batch) for batch in tiles.batches]
    return {"saved_model": due, "onnx": due, "onnx_fp16": rounded}


@pytest.fixture
def evidence(tiles: Tiles, outputs: dict[str, Any]) -> Evidence:
    return Evidence(tiles, dict(outputs))


def silent(_: str) -> None:
    pass


def test_the_fastest_that_is_proven_is_chosen(files: Files, evidence: Evidence) -> None:
    found = choose_engine(files, evidence, silent)
    engine = found.engine
    assert set(found.rates) == {str(choice) for choice in supported_choices()}
    assert max(found.rates, key=lambda name: found.rates[name]) == f"{engine.kind} {engine.precision}"
    assert engine.img_per_s == max(found.rates.values()) > 0
    assert engine.file == ("model.onnx" if engine.kind == "onnxruntime" else "model.fp16.onnx")
    assert found.fallback.precision == "f32"
    for one in (engine, found.fallback):
        assert one.proof is not None
        parent = "onnx" if one.kind == "onnxruntime" else "onnx_fp16"
        assert [row["against"] for row in one.proof.comparisons] == ["saved_model", parent]
    assert found.refused == {}


def corrupted(half: Any, change_constant: Any) -> Any:
    wrong = copy.deepcopy(half)
    change_constant(wrong, "up0_conv2/Conv.1", lambda w: w * np.float16(1.5))
    return wrong


def test_an_engine_that_does_not_agree_is_left_out_however_fast(
    files: Files, half: Any, evidence: Evidence, capsys: pytest.CaptureFixture[str], change_constant: Any
) -> None:
    write_model(corrupted(half, change_constant), files["onnx_fp16"])
    errors._warned.clear()
    found = choose_engine(files, evidence, silent, F32)
    assert (found.engine.kind, found.engine.file) == ("onnxruntime", "model.onnx")
    assert found.fallback == found.engine
    if max(found.rates, key=lambda name: found.rates[name]) == "openvino f32":
        assert "is the most accepted" in found.refused["openvino f32"]
        assert "warning: openvino f32 is not used" in capsys.readouterr().err


def test_where_none_agrees_the_figure_is_named(
    files: Files, half: Any, evidence: Evidence, change_constant: Any
) -> None:
    write_model(corrupted(half, change_constant), files["onnx_fp16"])
    with pytest.raises(ParityError, match=r"no engine in float32 .* is the most accepted"):
        choose_engine(files, evidence, silent, F32[:1])


def test_an_engine_that_cannot_load_is_left_out(files: Files, evidence: Evidence) -> None:
    files["onnx_fp16"].write_bytes(b"garbage")
    found = choose_engine(files, evidence, silent, F32)
    assert (found.engine.kind, list(found.rates)) == ("onnxruntime", ["onnxruntime f32"])
    assert "cannot load" in found.refused["openvino f32"]


def test_more_work_is_measured_to_be_slower(files: Files, tiles: Tiles) -> None:
    engines = {F32[1]: CpuEngine(files["onnx"], F32[1], threads=1)}
    small = measure(engines, tiles)[F32[1]]
    large = measure(engines, Tiles("", (np.zeros((1, 1, 700, 700), np.uint8),)))[F32[1]]
    assert small > 3 * large


CHOOSE = """
import json, sys
from dataclasses import asdict
from pathlib import Path
import numpy as np
from export.gate import engine_choice
from export.gate.proof import Evidence
from export.gate.tiles import Tiles

# INT8 is looked at first, whatever a busy machine would time.
engine_choice.measure = lambda engines, tiles: {choice: float(-index) for index, choice in enumerate(engines)}
folder = Path(sys.argv[1])
with np.load(folder / "evidence.npz") as stored:
    tiles = Tiles("", tuple(stored[name] for name in stored.files if name.startswith("tiles")))
    due = [stored[name] for name in stored.files if name.startswith("due")]
outputs = {name: list(due) for name in ("saved_model", "onnx", "onnx_fp16")}
files = {"onnx": folder / "model.onnx", "onnx_fp16": folder / "model.fp16.onnx", "int8": folder / "model.int8.zip"}
files = {name: path for name, path in files.items() if path.exists()}
found = engine_choice.choose_engine(files, Evidence(tiles, outputs), print)
print(json.dumps(asdict(found)))
"""


def chosen_within(most: str, folder: Path) -> dict[str, Any]:
    """What the gate chooses in a process whose libraries use no more than some of the processor's instructions."""
    done = subprocess.run(
        [sys.executable, "-c", CHOOSE, str(folder)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": most},
        capture_output=True,
        text=True,
        check=True,
    )
    chosen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return chosen


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory, random_saved_model: Any) -> Path:
    """ONNX, FP16 ONNX, INT8 and evidence of a network with large weights: sums of two products of 8-bit integers are
    often beyond 16 bits."""
    pytest.importorskip("nncf", reason="NNCF is not installed, which wants Python 3.10")
    from export.steps.half_precision import to_half
    from export.steps.int8 import quantise
    from export.steps.to_onnx import convert

    folder = tmp_path_factory.mktemp("quantised")
    random_saved_model(folder / "saved_model", 16)
    single = convert(folder / "saved_model")
    write_model(single, folder / "model.onnx")
    write_model(to_half(single), folder / "model.fp16.onnx")
    (batch,) = gather_tiles(Source(None), (284,)).batches
    quantise(folder / "model.onnx", [tile[None] for tile in batch], folder / "model.int8.zip")
    exact = CpuEngine(folder / "model.onnx", F32[1])
    np.savez(folder / "evidence.npz", tiles0=batch, due0=exact.infer(batch))
    return folder


def test_saturation_in_8_bits_is_seen_on_a_processor_without_vnni(quantised: Path) -> None:
    chosen = chosen_within("AVX2", quantised)
    # Bfloat16 is not tried there, and would crash.
    assert set(chosen["rates"]) == {"openvino int8", "openvino f32", "onnxruntime f32"}
    assert re.search("differ by|changes sides", chosen["refused"]["openvino int8"])
    assert chosen["engine"]["precision"] == "f32"
    assert chosen["engine"]["proof"]["instructions"] == ["avx2"]


@pytest.mark.skipif("vnni" not in instruction_sets(), reason="this processor has no VNNI")
def test_the_same_file_is_proven_with_vnni(quantised: Path) -> None:
    chosen = chosen_within("ALL", quantised)
    assert "openvino int8" not in chosen["refused"]
    assert chosen["engine"]["precision"] == "int8"
    assert "vnni" in chosen["engine"]["proof"]["instructions"]
    assert chosen["fallback"]["precision"] == "f32"


def test_the_selection_is_what_the_card_keeps(files: Files, evidence: Evidence) -> None:
    found = dataclasses.asdict(choose_engine(files, evidence, silent, F32))
    assert json.loads(json.dumps(found))["engine"]["kind"] in ("openvino", "onnxruntime")
