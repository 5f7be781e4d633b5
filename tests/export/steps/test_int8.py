from __future__ import annotations

import dataclasses
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from export.errors import ExportError, ParityError
from export.gate.engine_choice import INT8_CHOICE, choose_engine
from export.gate.proof import Evidence
from export.gate.scoring import Judge, ScoredSlices
from export.gate.tiles import Source, Tiles, training_tiles
from export.main import main
from export.steps.graph import write_model
from export.steps.int8 import prepared, quantise
from unet.engine import EngineError
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.names import INT8, ONNX, SAVED_MODEL
from unet.phantom import synthetic_stack

# One that others gave NNCF's logger.
OTHERS = logging.Handler(level=logging.DEBUG)


@pytest.fixture(scope="module")
def files(single: Any, half: Any, tiles: Tiles, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    pytest.importorskip("nncf", reason="NNCF is not installed, which wants Python 3.10")
    folder = tmp_path_factory.mktemp("int8")
    found = folder / "model.onnx", folder / "model.fp16.onnx", folder / "model.int8.zip"
    write_model(single, found[0])
    write_model(half, found[1])
    logger = logging.getLogger("nncf")
    logger.addHandler(OTHERS)
    quantise(found[0], [tiles.batches[0][index : index + 1] for index in range(3)], found[2])
    logger.removeHandler(OTHERS)
    return found


def test_what_others_want_of_the_log_stays(files: tuple[Path, Path, Path]) -> None:
    assert OTHERS.level == logging.DEBUG


def test_it_computes_in_integers_and_stays_close(
    files: tuple[Path, Path, Path], tiles: Tiles, capsys: pytest.CaptureFixture[str]
) -> None:
    with zipfile.ZipFile(files[2]) as packed:
        assert packed.namelist() == ["model.xml", "model.bin"]
        assert b'type="FakeQuantize"' in packed.read("model.xml")
    exact = CpuEngine(files[0], EngineChoice("onnxruntime", "f32"))
    engine = CpuEngine(files[2], INT8_CHOICE)
    for batch in tiles.batches:
        found, due = engine.infer(batch).astype(np.float32), exact.infer(batch).astype(np.float32)
        assert 0 < np.abs(found - due).mean() < 0.05
    assert "Statistics" not in capsys.readouterr().out


def test_what_is_quantised_is_the_same_function(single: Any, tiles: Tiles, tmp_path: Path) -> None:
    import openvino

    write_model(single, tmp_path / "model.onnx")
    core = openvino.Core()
    networks = core.read_model(tmp_path / "model.onnx"), prepared(tmp_path / "model.onnx")
    for batch in tiles.batches:
        due, found = (
            core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})({"image": batch})["probability"]
            for network in networks
        )
        # One step of float16 below 1.
        np.testing.assert_allclose(found.astype(np.float32), due.astype(np.float32), atol=2**-11)
    kinds = {node.get_type_name() for node in networks[1].get_ordered_ops()}
    assert not kinds & {"Slice", "DepthToSpace"}


def test_a_skip_is_quantised_once_as_it_leaves_its_convolution(files: tuple[Path, Path, Path]) -> None:
    import openvino

    with zipfile.ZipFile(files[2]) as packed:
        network = openvino.Core().read_model(packed.read("model.xml"), packed.read("model.bin"))
    cuts = [node for node in network.get_ordered_ops() if node.get_friendly_name().endswith("_crop/Slice")]
    assert len(cuts) == 4
    for cut in cuts:
        quantiser = cut.input_value(0).get_node()
        readers = sorted(port.get_node().get_type_name() for port in quantiser.output(0).get_target_inputs())
        assert (quantiser.get_type_name(), readers) == ("FakeQuantize", ["MaxPool", "StridedSlice"])
        assert [port.get_node().get_type_name() for port in cut.output(0).get_target_inputs()] == ["Concat"]


def test_it_is_considered_and_scored_like_every_other(
    files: tuple[Path, Path, Path], tiles: Tiles, reference: Any
) -> None:
    images, labels = synthetic_stack(slices=2, size=96, seed=3)
    slices = ScoredSlices(images, labels, 284)
    exact = CpuEngine(files[0], EngineChoice("onnxruntime", "f32"))
    judge = Judge.of(slices, slices.predict(exact.infer), SAVED_MODEL)
    due = [reference.probability(batch) for batch in tiles.batches]
    said: list[str] = []
    evidence = Evidence(tiles, {SAVED_MODEL: due, ONNX: due}, judge=judge)
    choices = [EngineChoice("onnxruntime", "f32")]
    considered = {ONNX: files[0], INT8: files[2]}
    found = choose_engine(considered, evidence, said.append, choices)
    assert str(INT8_CHOICE) in found.rates
    assert found.engine.proof is not None
    scores = found.engine.proof.scores
    assert scores is not None
    assert scores["step"] == f"{found.engine.kind} {found.engine.precision}"
    assert scores["ratio"] >= scores["least"]
    # One that loses the cells is refused, however fast.
    perfect = dataclasses.replace(judge.before, v_rand=tuple(2 * value for value in judge.before.v_rand))
    blind = dataclasses.replace(evidence, judge=Judge(slices, judge.expected, perfect, SAVED_MODEL))
    with pytest.raises(ParityError, match=r"keeps only|changes sides"):
        choose_engine(considered, blind, said.append, choices)


def test_calibration_is_on_slices_that_training_saw(tmp_path: Path) -> None:
    images = synthetic_stack(slices=4, size=96, seed=2)[0]
    tifffile.imwrite(tmp_path / "train-volume.tif", images, photometric="minisblack")
    found = training_tiles(Source(tmp_path, {"train-volume.tif": [1, 2]}), 204)
    assert [tile.shape for tile in found] == [(1, 1, 204, 204)] * 2
    assert not training_tiles(Source(tmp_path), 204)
    pytest.importorskip("nncf", reason="NNCF is not installed, which wants Python 3.10")
    with pytest.raises(ExportError, match="no tiles to calibrate"):
        quantise(tmp_path / "model.onnx", [], tmp_path / "model.int8.zip")


def test_without_scores_it_is_refused_where_it_was_asked_for(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--model_dir", model_dir, "--out", tmp_path / "out", "--data_dir", data_dir]
    assert main([*map(str, line), "--int8", "--tile_sizes", "204", "220"]) == 2
    assert "INT8 is accepted by the scores of labelled slices" in capsys.readouterr().err


def test_another_file_is_no_int8_engine(files: tuple[Path, Path, Path]) -> None:
    with pytest.raises(EngineError, match="is not an INT8 engine"):
        CpuEngine(files[0], INT8_CHOICE)
