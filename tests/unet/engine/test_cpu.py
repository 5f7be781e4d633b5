from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unet.card import Card
from unet.card.records import Engine, Proof
from unet.engine import EngineError
from unet.engine.cpu import CpuEngine, EngineChoice, has_bf16, load_engine, supported_choices
from unet.errors import UnetError
from unet.files import sha256_of
from unet.machine import instruction_sets

CHOICES = [EngineChoice("openvino", "f32"), EngineChoice("onnxruntime", "f32")]


def write_model(path: Path, *, crop: int = 92, input_type: int = 2, output: str = "probability") -> Path:
    """A graph with the served interface whose "probability" is the cropped image / 255."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    constants = {
        "starts": np.array([crop, crop]),
        "ends": np.array([-crop, -crop]),
        "axes": np.array([2, 3]),
        "scale": np.array(1 / 255, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["float", "starts", "ends", "axes"], ["cropped"]),
        helper.make_node("Mul", ["cropped", "scale"], ["scaled"]),
        helper.make_node("Cast", ["scaled"], [output], to=TensorProto.FLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", input_type, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT16, ["N", 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine") / "model.onnx")


def tiles(count: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(height).integers(0, 256, (count, 1, height, width), dtype=np.uint8)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_sizes_and_batches_follow_each_other_on_one_engine(model: Path, choice: EngineChoice, threads: int) -> None:
    engine = CpuEngine(model, choice, threads)
    earlier = []
    for count, height, width in ((1, 188, 188), (3, 204, 188), (4, 204, 188), (2, 572, 700), (1, 188, 188)):
        image = tiles(count, height, width)
        output = engine.infer(image)
        assert output.dtype == np.float16
        expected = (image[:, :, 92:-92, 92:-92] / np.float32(255)).astype(np.float16)
        np.testing.assert_allclose(output, expected, atol=5e-4)
        earlier.append((output, expected))
    # An output is the caller's own: later calls do not write into it.
    for output, expected in earlier:
        np.testing.assert_allclose(output, expected, atol=5e-4)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_strided_view_is_taken_as_it_looks(model: Path, choice: EngineChoice) -> None:
    image = tiles(2, 376, 376)[:, :, ::2, ::2]
    output = CpuEngine(model, choice).infer(image)
    np.testing.assert_allclose(output, image[:, :, 92:-92, 92:-92] / 255, atol=5e-4)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(
    ("image", "error", "sentence"),
    [
        (np.zeros((1, 1, 188, 188), np.float32), EngineError, "must be uint8, these are float32"),
        (np.zeros((1, 188, 188), np.uint8), EngineError, r"shape \[N, 1, H, W\], these have \[1, 188, 188\]"),
        (np.zeros((1, 3, 188, 188), np.uint8), EngineError, "these have"),
        (np.zeros((0, 1, 188, 188), np.uint8), EngineError, "these have"),
        (np.zeros((1, 1, 188, 200), np.uint8), UnetError, "200"),
        (np.zeros((1, 1, 172, 188), np.uint8), UnetError, "172"),
    ],
)
def test_what_is_no_batch_of_tiles_gets_one_sentence(
    model: Path, choice: EngineChoice, image: np.ndarray[Any, Any], error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        CpuEngine(model, choice).infer(image)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_files_that_are_no_such_model_get_one_sentence(tmp_path: Path, choice: EngineChoice) -> None:
    with pytest.raises(EngineError, match=r"none\.onnx does not exist"):
        CpuEngine(tmp_path / "none.onnx", choice)
    (tmp_path / "garbage.onnx").write_bytes(b"not a model")
    with pytest.raises(EngineError, match=r"cannot load .*garbage\.onnx"):
        CpuEngine(tmp_path / "garbage.onnx", choice)
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(EngineError, match=r"empty\.onnx"):
        CpuEngine(tmp_path / "empty.onnx", choice)
    for name, options in (("floats", {"input_type": 1}), ("renamed", {"output": "mask"})):
        path = write_model(tmp_path / f"{name}.onnx", **options)  # type: ignore[arg-type]
        with pytest.raises(EngineError, match="inputs and outputs"):
            CpuEngine(path, choice)
    path = write_model(tmp_path / "cropped.onnx", crop=90)
    with pytest.raises(EngineError, match=r"gave the shape \(1, 1, 8, 8\), due is \(1, 1, 4, 4\)"):
        CpuEngine(path, choice).infer(tiles(1, 188, 188))


def test_choices_check_themselves(model: Path) -> None:
    with pytest.raises(EngineError, match="engine tflite is unknown"):
        EngineChoice("tflite", "f32")
    with pytest.raises(EngineError, match="precision int4 is unknown"):
        EngineChoice("openvino", "int4")
    with pytest.raises(EngineError, match="ONNX Runtime computes in f32"):
        EngineChoice("onnxruntime", "bf16")
    with pytest.raises(EngineError, match="threads is 0"):
        CpuEngine(model, CHOICES[0], threads=0)


def test_bf16_is_offered_exactly_where_the_cpu_has_it(model: Path) -> None:
    bf16 = EngineChoice("openvino", "bf16")
    assert (bf16 in supported_choices()) == has_bf16() == ("bf16" in HERE or "amx" in HERE)
    assert set(CHOICES) <= set(supported_choices())
    if has_bf16():
        assert CpuEngine(model, bf16).infer(tiles(1, 188, 188)).shape == (1, 1, 4, 4)
    else:
        with pytest.raises(EngineError, match="no bf16 instructions"):
            CpuEngine(model, bf16)


def card_of(model: Path, precision: str, proven_with: tuple[str, ...], fallback: bool = True) -> Card:
    card = Card(model.parent)
    card.record("onnx_fp16", model, None, "tests")
    proof = Proof(sha256_of(model), "cpu", proven_with)
    card.engine = Engine("openvino", precision, model.name, 2.0, proof)
    if fallback:
        card.fallback = Engine("openvino", "f32", model.name, 1.0, proof)
    return card


HERE = instruction_sets()
WITHOUT = tuple(name for name in HERE if name not in ("bf16", "vnni", "amx"))


@pytest.mark.parametrize(
    ("precision", "proven_with", "holds"),
    [
        ("f32", HERE, True),
        ("f32", (), True),
        ("bf16", HERE, True),
        ("bf16", (*WITHOUT, "bf16"), "bf16" in HERE),
        ("int8", (*WITHOUT, "vnni"), "vnni" in HERE),
        ("int8", WITHOUT, "vnni" not in HERE),
    ],
)
def test_an_engine_whose_proof_does_not_hold_here_is_replaced_and_one_line_says_so(
    model: Path, precision: str, proven_with: tuple[str, ...], holds: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if holds and precision != "f32":  # this graph is no network in 8 bits, and bf16 may be missing
        from unet.engine.cpu import engine_here

        assert engine_here(card_of(model, precision, proven_with)).precision == precision
        return
    engine = load_engine(card_of(model, precision, proven_with))
    assert engine.choice == EngineChoice("openvino", "f32")
    assert len(caplog.records) == (0 if holds else 1)
    if not holds:
        text = caplog.text
        assert f"openvino {precision} was proven on a CPU with " in text
        assert "openvino f32 serves instead; export on this machine" in text
        with pytest.raises(EngineError, match=r"run python export/main\.py on this machine"):
            load_engine(card_of(model, precision, proven_with, fallback=False))


def test_the_loader_sees_a_limit_that_the_libraries_obey(model: Path) -> None:
    """As on a processor without VNNI: the version that was proven with it falls back, and says so."""
    if "vnni" not in HERE:
        pytest.skip("this processor has no VNNI to take away")
    card_of(model, "int8", HERE).save()
    program = (
        "import sys; from unet.card import Card; from unet.engine.cpu import load_engine; "
        "print(load_engine(Card.load(sys.argv[1])).choice)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(model.parent)],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "openvino f32\n"
    assert done.stderr.count("\n") == 1
    assert "openvino int8 was proven on a CPU with avx2, avx512, vnni" in done.stderr


def test_libraries_load_only_where_used_and_their_absence_names_the_extra(model: Path) -> None:
    script = (
        "import sys\n"
        "from unet.engine.cpu import CpuEngine, EngineChoice, EngineError\n"
        "print([name for name in ('openvino', 'onnxruntime', 'tensorflow', 'onnx') if name in sys.modules])\n"
        "for kind in ('openvino', 'onnxruntime'):\n"
        "    sys.modules[kind] = None\n"
        "    try:\n"
        f"        CpuEngine({str(model)!r}, EngineChoice(kind, 'f32'))\n"
        "    except EngineError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[]",
        "OpenVINO is not installed: pip install 'unet-medical-triton[serve]'",
        "ONNX Runtime is not installed: pip install 'unet-medical-triton[serve]'",
    ]
