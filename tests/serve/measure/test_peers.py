from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
import tifffile
from onnx import TensorProto, helper, numpy_helper

from serve.measure.common import MeasureError
from serve.measure.peers.comparison import Comparison, Subject
from serve.measure.peers.process import call_worker, tiles_of
from serve.measure.peers.settings import PeersSettings
from serve.measure.peers.table import LABELS, bar_table, bars, convolution_gflop, report, table
from serve.measure.peers.worker import SUBJECTS, img_per_s
from serve.peers import main
from unet.machine import instruction_sets


def test_every_subject_has_a_label() -> None:
    assert list(LABELS) == list(SUBJECTS)


def one_convolution() -> onnx.ModelProto:
    """uint8 [N, 1, H, W] through one convolution of 3 x 3."""
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["float", "a"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "a convolution",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["N", 2, "h", "w"])],
        [numpy_helper.from_array(np.zeros((2, 1, 3, 3), np.float32), "a")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


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


def comparison(rates: dict[str, list[float]], isa: str = "") -> Comparison:
    settings = PeersSettings(batch_sizes=(1,))
    made = Comparison(Path(), dict.fromkeys(rates, ""), settings, isa)
    made.subjects = {name: Subject(name, {1: values}, difference=0.0) for name, values in rates.items()}
    return made


def words(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ratios_are_taken_round_by_round() -> None:
    made = comparison({"engine": [10.0, 30.0, 24.0], "tensorflow": [5.0, 10.0, 8.0]})
    assert made.speed_up("tensorflow", 1) == [2.0, 3.0, 3.0]
    made.peaks = {"bfloat16": [400.0, 500.0, 480.0]}
    text = report(made, gflop=10.0)
    lines = [words(line) for line in text.splitlines()]
    assert ["TensorFlow SavedModel, float32", "8.00", "3.00 (2.00 to 3.00)", "0.0e+00"] in lines
    assert "matrix product, GFLOP/s (int8: GOP/s): bfloat16 480" in text


def test_bars_are_met_or_missed_round_by_round() -> None:
    rates = {"tensorflow": [5.0, 5.0, 5.0], "pytorch": [2.0, 12.0, 2.0], "openvino": [10.0, 10.0, 10.0]}
    made = comparison({"engine": [25.0, 25.0, 20.0], **rates})
    made.peaks, made.subjects["engine"].precision = {"int8": [250.0, 500.0, 500.0]}, "int8"
    found = {one.title: (one.ratios[1], one.verdict) for one in bars(made, gflop=10.0)}
    assert found["engine / TensorFlow, its defaults"] == (5.0, "met")
    assert found["engine / OpenVINO, its defaults"] == (2.5, "met")
    # The fastest in each round: 5, 12 and 5.
    assert found["engine / the fastest of TensorFlow, ONNX Runtime and PyTorch with any switch"] == (4.0, "met")
    assert found["engine / matrix product in int8, batch 1"] == (0.5, "missed")
    made.subjects["openvino"].failure = "it was killed by signal 9"
    found = {one.title: (one.ratios[1], one.verdict) for one in bars(made, gflop=10.0)}
    assert found["engine / OpenVINO, its defaults"] == (None, "not measured")
    lines = [words(line) for line in bar_table(bars(made, 10.0), (1,)).splitlines()]
    assert lines[-1] == ["engine / matrix product in int8, batch 1", "0.95", "0.50", "missed"]
    # Other bars count where all are held to fewer instructions.
    held = comparison({"engine": [9.0], **{name: values[:1] for name, values in rates.items()}}, "AVX2")
    wanted = {one.title: (one.wanted, one.ratios[1]) for one in bars(held, 1.0)}
    assert wanted["engine / OpenVINO, its defaults"] == (1.5, 0.9)
    assert wanted["engine / the fastest of TensorFlow, ONNX Runtime and PyTorch at their defaults"] == (3.0, 1.8)


def test_a_subject_that_computes_something_else_is_no_peer(tmp_path: Path) -> None:
    made = comparison({"engine": [1.0], "tensorflow": [1.0]})
    made.folder = tmp_path
    (tmp_path / "answers").mkdir()
    for name, value in (("engine", 0.5), ("tensorflow", 0.9)):
        np.save(tmp_path / "answers" / f"{name}.npy", np.full((1, 1, 4, 4), value, np.float32))
    made.finish()
    assert "differs from TensorFlow's by 0.4" in made.subjects["engine"].failure
    assert "not measured" in table(made).splitlines()[2]


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="No such file or directory"):
        call_worker(sys.executable, "onnxruntime", tmp_path, 1.0, [1], limit_s=60)


def test_a_worker_that_takes_too_long_is_ended(tiny_artefacts: Path, tmp_path: Path) -> None:
    """As reference code does that computes for minutes."""
    np.save(tmp_path / "tiles.npy", np.zeros((1, 1, 204, 204), np.uint8))
    (tmp_path / "model.onnx").symlink_to(tiny_artefacts / "model.fp16.onnx")
    with pytest.raises(MeasureError, match="took more than 3 s: raise --limit_s"):
        call_worker(sys.executable, "onnxruntime", tmp_path, 3600.0, [1], limit_s=3)
    living = [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]
    assert not [one for one in living if "worker.py" in " ".join(one.cmdline())]


def test_only_the_processors_own_number_formats_are_measured(tmp_path: Path) -> None:
    """Held to AVX2 the others would be reference code; the answer comes before any library is loaded."""
    held = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    for name in ("gemm_int8", "gemm_bfloat16", "tensorflow_bf16", "pytorch_bf16"):
        found = call_worker(sys.executable, name, tmp_path, 3600.0, [1], limit_s=60, environment=held)
        assert found["skipped"].startswith("this processor has no instructions for ")


def test_tiles_are_real_pixels_mirrored_to_size(tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (2, 150, 260), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", stack, photometric="minisblack")
    tiles = tiles_of(tmp_path / "stack.tif", 3, 204)
    assert tiles.shape == (3, 1, 204, 204)
    np.testing.assert_array_equal(tiles[2, 0, :150], stack[0, :, :204])
    np.testing.assert_array_equal(tiles[0, 0, 150], stack[0, 148, :204])
    assert tiles_of(None, 5, 204).shape == (5, 1, 204, 204)


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--check"]):
        assert main(flags) == 2
        said = capfd.readouterr().err
        assert said.startswith("error: result/saved_model does not exist: run `make demo` first")
        assert said.count("\n") == 1


def test_make_peers_looks_before_it_installs(project_root: Path) -> None:
    """In a folder of its own, where nothing was made and nothing is installed."""
    line = ["make", "--dry-run", "-f", str(project_root / "Makefile"), "peers"]
    said = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=True).stdout
    assert 0 < said.index("--check") < said.index("peers-install")


def test_what_was_measured_before_the_end_is_kept() -> None:
    """The second batch size of one subject, all of another, and TensorFlow's answer are missing."""
    made = comparison({"engine": [4.0, 5.0], "tensorflow": [2.0], "openvino": []})
    del made.subjects["openvino"].img_per_s[1]
    made.subjects["engine"].precision = "f32"
    made.finish()
    assert made.subjects["openvino"].failure == "the run ended before it was measured"
    assert made.unchecked.startswith("TensorFlow gave no answer to compare with")
    text = report(made, 1.0)
    # Of the rounds that both have.
    assert ["TensorFlow SavedModel, float32", "2.00", "2.00 (2.00 to 2.00)", "0.0e+00"] in map(words, text.splitlines())
    assert made.unchecked in text


def test_a_run_that_ends_early_writes_what_it_has(
    tiny_artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C comes after the first subject; the other pieces of the command are the real ones."""
    (tmp_path / "saved_model").mkdir()
    shutil.copytree(tiny_artefacts, tmp_path, dirs_exist_ok=True)
    onnx.save(one_convolution(), str(tmp_path / "model.onnx"))

    def ended(settings: PeersSettings, comparisons: list[Comparison]) -> None:
        comparisons[0].subjects["engine"].img_per_s = {1: [3.5]}
        comparisons[0].folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr("serve.peers.run", ended)
    line = ["--model_dir", tmp_path, "--artefacts", tmp_path, "--out", tmp_path / "out", "--batch_sizes", 1]
    assert main([*map(str, line), "--tile_size", "204"]) == 130
    found = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert found["own_instructions"]["subjects"]["engine"]["img_per_s"] == {"1": [3.5]}
    assert "3.50" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_subjects_agree_and_are_measured(project_root: Path, tmp_path: Path) -> None:
    """A trained and exported network, with all instructions and held to AVX2; PyTorch too, where it is installed."""
    data, result, artefacts = tmp_path / "data", tmp_path / "result", tmp_path / "artefacts"
    flags = ["--base_filters=4", "--tile_size=236", "--max_steps=10", "--exec_mode=train"]
    for words in (
        ["-m", "unet.phantom", "--out", data, "--slices", "5", "--size", "96"],
        ["train/main.py", f"--data_dir={data}", f"--model_dir={result}", "--crossvalidation_idx=4", *flags],
        ["export/main.py", "--model_dir", result, "--out", artefacts, "--data_dir", data],
        [
            *("serve/peers.py", "--model_dir", result, "--artefacts", artefacts, "--out", tmp_path / "peers"),
            *("--rounds", "1", "--seconds", "0.1", "--batch_sizes", "1", "2", "--tile_size", "252", "--isa", "AVX2"),
        ],
    ):
        line = [sys.executable, *map(str, words)]
        done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    for one in (
        "engine",
        "engine AVX2",
        "gemm_float32 AVX2" if (project_root / ".venv-peers").exists() else "openvino",
    ):
        assert f"{one}: starts" in done.stderr
        assert f"{one}: done in" in done.stderr
    # Nothing but those lines: no library's own.
    assert all(line.startswith("[") or ".venv-peers" in line for line in done.stderr.splitlines()), done.stderr
    found = json.loads((tmp_path / "peers" / "peers.json").read_text())
    with_torch = (project_root / ".venv-peers").exists()
    expected = set(SUBJECTS) if with_torch else {name for name in SUBJECTS if not name.startswith("pytorch")}
    native = {name for name in expected if name != "onnxruntime" and not name.endswith("bf16")}
    has_bf16 = "bf16" in instruction_sets()
    for case, measured in (("own_instructions", expected if has_bf16 else native), ("held_to_AVX2", native)):
        assert set(found[case]["subjects"]) == expected
        for name, subject in found[case]["subjects"].items():
            if name == "pytorch_compiled" and "differs from TensorFlow's" in subject["failure"]:
                # PyTorch 2.13 compiles so small a network into one that answers NaN, which gets no figure.
                continue
            assert bool(subject["failure"]) == (name not in measured), subject
            if name in measured:
                assert set(subject["img_per_s"]) == {"1", "2"}
                assert subject["difference"] < 0.01
        assert ("float32" in found[case]["gemm_gflop_per_s"]) == with_torch
        assert {bar["verdict"] for bar in found[case]["bars"]} <= {"met", "missed", "not measured"}
    assert set(found["held_to_AVX2"]["gemm_gflop_per_s"]) <= {"float32"}
    assert found["gflop_per_tile"] > 0
