from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ExportError
from export.gate.parity import HALF_WEIGHTS, compare
from export.gate.tiles import Source, gather_tiles
from export.steps.graph import constants, write_model
from export.steps.half_precision import to_half
from export.steps.reference import Reference
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.files import sha256_of

ORT, OPENVINO = EngineChoice("onnxruntime", "f32"), EngineChoice("openvino", "f32")


def conv_weights(model: Any, layer: str) -> tuple[str, str]:
    node = next(node for node in model.graph.node if node.name == f"{layer}/Conv")
    return node.input[1], node.input[2]


def test_nothing_in_it_is_float32(half: Any) -> None:
    kinds = {value.dtype for value in constants(half).values()}
    assert kinds == {np.dtype(np.float16), np.dtype(np.int64)}
    ops = [node.op_type for node in half.graph.node]
    assert ops.count("Cast") == 1
    assert ops[-1] == "Sigmoid"
    assert ops.count("Slice") == 4


def test_every_intensity_is_normalised_exactly(half: Any) -> None:
    import onnx
    import onnxruntime

    model = copy.deepcopy(half)
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(model.graph.node[2].output[0]))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    image = np.resize(np.arange(256, dtype=np.uint8), (1, 1, 188, 188))
    found = session.run([model.graph.node[2].output[0]], {"image": image})[0]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found.astype(np.float64), (image - 127.5) / 128)


@pytest.mark.parametrize("size", [572, 700])
def test_it_runs_and_agrees_at_the_served_sizes_in_both_engines(
    half: Any, reference: Reference, tmp_path: Path, size: int
) -> None:
    write_model(half, tmp_path / "half.onnx")
    batches = [gather_tiles(Source(None), (size,)).batches[0]]
    batches.append(batches[0][:1])
    expected = [reference.probability(batch) for batch in batches]
    for choice in (ORT, OPENVINO):
        engine = CpuEngine(tmp_path / "half.onnx", choice)
        found = [engine.infer(batch) for batch in batches]
        compare(str(choice), "SavedModel", found, expected, HALF_WEIGHTS).check()


@pytest.mark.parametrize("choice", [ORT, OPENVINO], ids=str)
def test_extreme_logits_give_certainty_and_never_nan(
    single: Any, tmp_path: Path, choice: EngineChoice, change_constant: Any
) -> None:
    tiles = gather_tiles(Source(None), (204,)).batches[0]
    outputs = []
    for factor in (200, -200):
        model = copy.deepcopy(single)
        change_constant(model, conv_weights(model, "logits")[0], lambda w, factor=factor: w * np.float32(factor))
        write_model(to_half(model), tmp_path / f"{factor}.onnx")
        outputs.append(CpuEngine(tmp_path / f"{factor}.onnx", choice).infer(tiles))
    assert np.isfinite(outputs).all()
    assert np.min(outputs) == 0
    assert np.max(outputs) == 1


def test_a_weight_beyond_float16_is_refused_by_name(single: Any, change_constant: Any) -> None:
    model = copy.deepcopy(single)
    name = conv_weights(model, "down2_conv1")[0]
    change_constant(model, name, lambda w: w * np.float32(1e6))
    with pytest.raises(ExportError, match=r"down2_conv1/Conv\.1 holds .*beyond float16's 65504"):
        to_half(model)


def test_the_graph_given_stays_as_it_is(single: Any) -> None:
    before = single.SerializeToString(deterministic=True)
    to_half(single)
    assert single.SerializeToString(deterministic=True) == before


def test_another_beginning_or_end_is_refused(single: Any, half: Any, change_constant: Any) -> None:
    with pytest.raises(ExportError, match="Sub follows Cast where Mul is due"):
        to_half(half)
    model = copy.deepcopy(single)
    scale = next(node for node in model.graph.node if node.op_type == "Mul").input[1]
    change_constant(model, scale, lambda s: s * np.float32(0.5))
    with pytest.raises(ExportError, match=r"maps 255 to 0, not 127\.5"):
        to_half(model)
    model = copy.deepcopy(single)
    for name in conv_weights(model, "logits"):
        change_constant(model, name, lambda w: np.concatenate([w, w[:1]]))
    with pytest.raises(ExportError, match="has 3 classes where 2 are due"):
        to_half(model)


def test_its_command_writes_the_same_bytes(single: Any, half: Any, tmp_path: Path) -> None:
    write_model(single, tmp_path / "model.onnx")
    write_model(half, tmp_path / "here.onnx")
    command = [sys.executable, "-m", "export.steps.half_precision", "model.onnx", "there.onnx"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    assert sha256_of(tmp_path / "here.onnx") == sha256_of(tmp_path / "there.onnx")
