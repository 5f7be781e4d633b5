from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import tifffile
from onnx import TensorProto, helper, numpy_helper

from serve.measure.peer_worker import SUBJECTS, img_per_s
from serve.measure.peers import LABELS, Comparison, PeersError, Subject, call_worker, convolution_gflop, table, tiles_of


def test_every_subject_has_a_label() -> None:
    assert list(LABELS) == list(SUBJECTS)


def test_arithmetic_is_counted_from_the_graph(tmp_path: Path) -> None:
    kernels = {"a": np.zeros((5, 1, 3, 3), np.float32), "b": np.zeros((2, 5, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "a"], ["x"]),
        helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["y", "b"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "two convolutions",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 2, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in kernels.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), str(tmp_path / "model.onnx"))
    expected = 2 * (5 * 9 * 100 * 100 + 2 * 5 * 50 * 50) / 1e9
    assert convolution_gflop(tmp_path / "model.onnx", 102) == pytest.approx(expected)


def test_images_over_time_without_the_first_call() -> None:
    calls = []
    tiles = np.zeros((4, 1, 2, 2), np.uint8)
    rate = img_per_s(lambda given: calls.append(len(given)) or given, tiles, 0.0)  # type: ignore[func-returns-value]
    assert calls == [4, 4]
    assert rate > 0


def comparison(**rates: list[float]) -> Comparison:
    made = Comparison(Path(), dict.fromkeys(rates, ""), 1.0, [1])
    made.subjects = {name: Subject(name, {1: values}, 0.0) for name, values in rates.items()}
    return made


def test_ratios_are_taken_round_by_round() -> None:
    made = comparison(engine=[10.0, 30.0, 24.0], tensorflow=[5.0, 10.0, 8.0])
    assert made.speed_up("tensorflow", 1) == [2.0, 3.0, 3.0]
    made.peaks = {"bfloat16": [400.0, 500.0, 480.0]}
    text = table(made, gflop=10.0, precision="bf16")
    assert "| TensorFlow SavedModel, float32 | 8.00 | 3.00 (2.00 to 3.00) |" in text
    assert "240 GFLOP/s, 50% of it" in text


def test_a_subject_that_computes_something_else_is_no_peer(tmp_path: Path) -> None:
    made = comparison(engine=[1.0], tensorflow=[1.0])
    made.folder = tmp_path
    (tmp_path / "answers").mkdir()
    for name, value in (("engine", 0.5), ("tensorflow", 0.9)):
        np.save(tmp_path / "answers" / f"{name}.npy", np.full((1, 1, 4, 4), value, np.float32))
    made._compare_answers()
    assert "differs from TensorFlow's by 0.4" in made.subjects["engine"].failure
    assert "not measured" in table(made, 1.0, "bf16").splitlines()[2]


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(PeersError, match="No such file or directory"):
        call_worker(sys.executable, "onnxruntime", tmp_path, 1.0, [1])


def test_tiles_are_real_pixels_mirrored_to_size(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (2, 150, 260), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    tiles = tiles_of(tmp_path / "stack.tif", 3, 204)
    assert tiles.shape == (3, 1, 204, 204)
    np.testing.assert_array_equal(tiles[2, 0, :150], stack[0, :, :204])
    np.testing.assert_array_equal(tiles[0, 0, 150], stack[0, 148, :204])
    assert tiles_of(None, 5, 204).shape == (5, 1, 204, 204)


def test_what_is_missing_is_named(project_root: Path, tmp_path: Path) -> None:
    line = [sys.executable, "serve/peers.py", "--artefacts", str(tmp_path)]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_subjects_agree_and_are_measured(project_root: Path, tmp_path: Path) -> None:
    """A trained and exported network; PyTorch too, where its environment was made."""
    data, result, artefacts = tmp_path / "data", tmp_path / "result", tmp_path / "artefacts"
    flags = ["--base_filters=4", "--tile_size=236", "--max_steps=10", "--exec_mode=train"]
    for words in (
        ["-m", "unet.phantom", "--out", data, "--slices", "5", "--size", "96"],
        ["train/main.py", f"--data_dir={data}", f"--model_dir={result}", "--crossvalidation_idx=4", *flags],
        ["export/main.py", "--model_dir", result, "--out", artefacts, "--data_dir", data],
        [
            *("serve/peers.py", "--model_dir", result, "--artefacts", artefacts, "--out", tmp_path / "peers"),
            *("--rounds", "1", "--seconds", "0.1", "--batch_sizes", "1", "2", "--tile_size", "252"),
        ],
    ):
        line = [sys.executable, *map(str, words)]
        done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "peers" / "peers.json").read_text())
    with_torch = (project_root / ".venv-peers").exists()
    expected = set(SUBJECTS) if with_torch else {name for name in SUBJECTS if not name.startswith("pytorch")}
    assert set(found["subjects"]) == expected
    for subject in found["subjects"].values():
        assert subject["failure"] == ""
        assert set(subject["img_per_s"]) == {"1", "2"}
        assert subject["difference"] < 0.01
    assert found["gflop_per_tile"] > 0
    assert bool(found["gemm_gflop_per_s"]) == with_torch
