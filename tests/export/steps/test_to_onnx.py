from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ExportError
from export.gate.parity import LOGITS as LOGITS_TOLERANCE
from export.gate.parity import SAME_TYPE, compare
from export.gate.tiles import Tiles
from export.steps.graph import LOGITS, constants, read_model, with_logits, write_model
from export.steps.reference import Reference, load_signature, parameter_count
from export.steps.to_onnx import convert
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.files import sha256_of
from unet.names import INPUT


def test_the_graph_is_the_network_and_nothing_else(single: Any) -> None:
    ops: dict[str, int] = {}
    for node in single.graph.node:
        ops[node.op_type] = ops.get(node.op_type, 0) + 1
    assert ops == {
        "Cast": 2,
        "Mul": 1,
        "Sub": 1,
        "Conv": 23,
        "Relu": 18,
        "MaxPool": 4,
        "DepthToSpace": 4,
        "Slice": 5,
        "Concat": 4,
        "Softmax": 1,
    }
    assert [opset.version for opset in single.opset_import] == [17]
    names = [node.name for node in single.graph.node]
    assert len(set(names)) == len(names)
    assert b"PartitionedCall" not in single.SerializeToString()
    assert {"down0_conv1/Conv", "up3_upconv/Conv", "up0_conv2/Relu", "logits/Conv"} <= set(names)


def test_the_same_graph_comes_of_a_conversion_that_left_pairs_of_reshapes(
    single: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tf2onnx.optimizer.back_to_back_optimizer import _func_map

    for pair in ("Squeeze", "Unsqueeze"), ("Reshape",):
        monkeypatch.delitem(_func_map, pair)
    assert convert(model_dir / "saved_model") == single


def test_weights_are_stored_once(single: Any, model_dir: Path) -> None:
    convolutions = {name for node in single.graph.node if node.op_type == "Conv" for name in node.input[1:]}
    stored = sum(value.size for name, value in constants(single).items() if name in convolutions)
    # The bias of an up-convolution is repeated for its four output pixels: (16 + 8 + 4 + 2) x 3 more numbers.
    assert stored == parameter_count(model_dir / "saved_model") + 90


def test_it_is_the_saved_model_at_every_size_and_batch(
    single: Any, reference: Reference, tiles: Tiles, tmp_path: Path
) -> None:
    import onnxruntime

    write_model(single, tmp_path / "model.onnx")
    engine = CpuEngine(tmp_path / "model.onnx", EngineChoice("onnxruntime", "f32"))
    batches = [*tiles.batches, tiles.batches[0][:1]]
    found = [engine.infer(batch) for batch in batches]
    compare("ONNX", "SavedModel", found, [reference.probability(batch) for batch in batches], SAME_TYPE).check()
    # The test means something only where the probabilities are spread.
    assert np.std(found[0].astype(np.float32)) > 0.1

    session = onnxruntime.InferenceSession(with_logits(single).SerializeToString())
    logits = [session.run([LOGITS], {INPUT: batch})[0] for batch in batches]
    compare("ONNX", "SavedModel", logits, [reference.logits(batch) for batch in batches], LOGITS_TOLERANCE).check()


def test_its_command_writes_the_same_bytes(single: Any, model_dir: Path, tmp_path: Path) -> None:
    write_model(single, tmp_path / "here.onnx")
    command = [
        sys.executable,
        "-m",
        "export.steps.to_onnx",
        str(model_dir / "saved_model"),
        str(tmp_path / "there.onnx"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    assert sha256_of(tmp_path / "here.onnx") == sha256_of(tmp_path / "there.onnx")
    assert read_model(tmp_path / "there.onnx") == single


def test_what_is_no_saved_model_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not a SavedModel"):
        convert(tmp_path)
    (tmp_path / "saved_model.pb").write_bytes(b"not protobuf")
    with pytest.raises(ExportError, match="cannot be loaded as a SavedModel"):
        convert(tmp_path)


def test_a_saved_model_of_another_project_is_refused(tmp_path: Path) -> None:
    import tensorflow as tf

    module = tf.Module()
    tf.saved_model.save(module, str(tmp_path))
    with pytest.raises(ExportError, match=r"has no signature network \(it has"):
        load_signature(tmp_path, "network")


@pytest.mark.slow
def test_the_published_size_is_converted_in_moderate_memory(
    random_saved_model: Callable[..., None], project_root: Path, tmp_path: Path
) -> None:
    random_saved_model(tmp_path / "saved_model", 64)
    program = (
        "import resource, sys; from export.steps.to_onnx import main; main(sys.argv[1:]); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    line = [sys.executable, "-c", program, str(tmp_path / "saved_model"), str(tmp_path / "model.onnx")]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=True)
    peak_gb = int(done.stdout.split()[-1]) * 1024 / 1e9
    assert (tmp_path / "model.onnx").stat().st_size > 31_000_000 * 4
    # 8 GB while the copies of its weights pile up, 3.4 GB where they do not.
    assert peak_gb < 5
