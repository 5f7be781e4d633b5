"""The package is run by BioImage.IO's own core, as the programs that use it do."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from export.errors import ExportError
from export.main import main
from export.steps.bioimageio import float_interface, packaged, write_package
from serve.models.config import ModelSettings
from serve.models.publish import publish
from unet.card import Card
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.names import BIOIMAGEIO, BIOIMAGEIO_FILE, ONNX_FILE

core = pytest.importorskip("bioimageio.core")


@pytest.fixture(scope="module")
def artefacts(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bioimageio") / "artefacts"
    line = [
        "--model_dir",
        model_dir,
        "--out",
        out,
        "--data_dir",
        data_dir,
        "--tile_sizes",
        "204",
        "220",
        "--bioimageio",
    ]
    assert main(list(map(str, line))) == 0
    return out


@pytest.fixture(scope="module")
def description(artefacts: Path) -> Any:
    return core.load_model_description(artefacts / BIOIMAGEIO_FILE)


def test_its_own_core_finds_it_right(description: Any) -> None:
    summary = core.test_model(description)
    assert summary.status == "passed", summary.format()


@pytest.mark.parametrize(("count", "height", "width"), [(1, 188, 188), (2, 204, 252)])
def test_every_valid_size_gives_what_the_exported_network_gives(
    artefacts: Path, description: Any, count: int, height: int, width: int
) -> None:
    image = np.random.default_rng(3).integers(0, 256, (count, 1, height, width), np.uint8)
    found = core.predict(model=description, inputs={"image": image.astype(np.float32)})
    expected = CpuEngine(artefacts / ONNX_FILE, EngineChoice("onnxruntime", "f32")).infer(image)
    answer = np.asarray(found.members["probability"].data)
    assert answer.shape == (count, 1, height - 184, width - 184)
    # The served network rounds to float16.
    np.testing.assert_allclose(answer, expected, atol=5e-4)
    assert answer.std() > 0.01


def test_it_says_what_a_user_must_know(artefacts: Path, description: Any) -> None:
    assert description.inputs[0].axes[2].size.min == 188
    assert description.config.model_dump()["unet_medical"]["threshold"] == 0.6
    with zipfile.ZipFile(artefacts / BIOIMAGEIO_FILE) as packed:
        text = packed.read("README.md").decode()
    assert "intensities from 0 to 255" in text
    assert "184 pixels smaller, 92 on each side" in text
    assert "not above 0.6" in text
    assert "Not measured: no labels were known." in text


def test_the_card_proves_it_and_what_serves_does_without(artefacts: Path, tmp_path: Path) -> None:
    entry = Card.load(artefacts).artefacts[BIOIMAGEIO]
    assert entry.parent == "onnx"
    assert entry.proof is not None
    assert {row["against"] for row in entry.proof.comparisons} == {"saved_model", "onnx"}
    publish(artefacts, tmp_path / "models", ModelSettings())
    assert not list((tmp_path / "models").rglob(BIOIMAGEIO_FILE))


def test_only_the_ends_of_the_network_change(single: Any) -> None:
    before = single.SerializeToString()
    changed = float_interface(single)
    assert single.SerializeToString() == before
    ends = [*changed.graph.input, *changed.graph.output]
    assert [(end.name, end.type.tensor_type.elem_type) for end in ends] == [
        ("image", onnx.TensorProto.FLOAT),
        ("probability", onnx.TensorProto.FLOAT),
    ]
    kinds = [node.op_type for node in single.graph.node]
    assert [node.op_type for node in changed.graph.node] == [kind for kind in kinds if kind != "Cast"]


def test_what_is_packaged_is_what_is_proven(single: Any, tmp_path: Path) -> None:
    tile = np.full((1, 1, 188, 188), 7, np.uint8)
    path = tmp_path / BIOIMAGEIO_FILE
    write_package(single, tile, {"base_filters": 2}, path, validation="None.")
    with zipfile.ZipFile(path) as packed, packed.open("test_output.npy") as stream:
        np.testing.assert_array_equal(packaged(path)(tile), np.load(stream).astype(np.float16))
    assert [one.name for one in tmp_path.iterdir()] == [BIOIMAGEIO_FILE]


def test_an_answer_that_no_package_can_be_tested_with_is_refused_in_words(tmp_path: Path) -> None:
    """BioImage.IO wants values above 1e-5; its own words would be a traceback."""
    nothing = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> nothing (uint8[N,1,H,W] image) => (float16[N,1,h,w] probability)
        <int64[2] starts = {92, 92}, int64[2] ends = {-92, -92}, int64[2] axes = {2, 3}, float zero = {0.0}> {
            whole = Cast <to: int = 1> (image)
            inner = Slice (whole, starts, ends, axes)
            zeros = Mul (inner, zero)
            probability = Cast <to: int = 10> (zeros)
        }"""
    )
    path, tile = tmp_path / BIOIMAGEIO_FILE, np.full((1, 1, 188, 188), 7, np.uint8)
    with pytest.raises(ExportError, match=r"no valid package: .* too small .*; leave out --bioimageio"):
        write_package(nothing, tile, {"base_filters": 2}, path, validation="None.")
    assert list(tmp_path.iterdir()) == []


def test_without_the_library_it_is_refused_before_any_work(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.pipeline.can_package", lambda: False)
    assert main(["--model_dir", str(model_dir), "--out", str(tmp_path / "out"), "--bioimageio"]) == 2
    assert "pip install 'unet-medical-triton[bioimageio]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
