from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import minisign
import numpy as np
import pytest

from export.errors import ExportError
from export.main import main, parse_arguments
from export.plan.settings import BuildSettings
from export.plan.trtexec import plan_command
from export.record.folder import sole_writer
from export.record.provenance import versions
from tests.cards import rewrite_record
from unet.card import Card, CardError
from unet.card.records import Proof
from unet.card.signature import verify
from unet.engine.cpu import load_engine
from unet.files import atomic_directory, sha256_of

ROOT = Path(__file__).resolve().parent.parent.parent
SIZES = ("--tile_sizes", "204", "220")


def export(model_dir: Path, out: Path, *more: str | Path) -> int:
    return main(["--model_dir", str(model_dir), "--out", str(out), *SIZES, *map(str, more)])


@pytest.fixture(scope="module")
def artefacts(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "artefacts"
    assert export(model_dir, out, "--data_dir", data_dir) == 0
    return out


def proof_of(card: Card, name: str) -> Proof:
    proof = card.artefacts[name].proof
    assert proof is not None
    return proof


def test_artefacts_carry_their_history(artefacts: Path, model_dir: Path, data_dir: Path) -> None:
    names = {path.name for path in artefacts.iterdir()}
    assert names == {"saved_model", "model.onnx", "model.fp16.onnx", "card.json", "card.md"}
    card = Card.load(artefacts)
    assert [(name, entry.parent) for name, entry in card.artefacts.items()] == [
        ("saved_model", None),
        ("onnx", "saved_model"),
        ("onnx_fp16", "onnx"),
    ]
    assert card.artefacts["saved_model"].sha256 == sha256_of(model_dir / "saved_model")
    assert card.artefacts["saved_model"].command == "python train/main.py --config config.json"
    assert card.artefacts["onnx"].versions["tf2onnx"]
    assert card.tile_sizes == (204, 220)
    assert card.model["base_filters"] == 2
    assert (card.model["threshold"], card.model["threshold_from"]) == (0.6, "validation")
    assert card.model["parity_tiles"] == f"held-out pages 1, 3 of {data_dir / 'train-volume.tif'}"
    assert card.artefacts["saved_model"].proof is None
    rows = [row for name in ("onnx", "onnx_fp16") for row in proof_of(card, name).comparisons]
    assert [(row["step"], row["against"], row["quantity"]) for row in rows] == [
        ("onnx", "saved_model", "logits"),
        ("onnx", "saved_model", "probability"),
        ("onnx_fp16", "saved_model", "probability"),
        ("onnx_fp16", "onnx", "probability"),
    ]
    assert all(row["reason"] for row in rows)
    peaks = proof_of(card, "onnx_fp16").facts["peaks"]
    assert {"down0_conv1/Conv", "logits/Conv"} <= set(peaks)
    assert all(0 < peak < 65504 for peak in peaks.values())
    assert card.engine.proof is not None
    assert card.engine.proof.sha256 == sha256_of(artefacts / card.engine.file)
    assert card.model["machine"]["instructions"] == list(card.engine.proof.instructions)


def test_the_chosen_engine_loads_and_segments(artefacts: Path) -> None:
    card = Card.load(artefacts)
    engine = load_engine(card)
    output = engine.infer(np.zeros((2, 1, 220, 204), np.uint8))
    assert output.shape == (2, 1, 36, 20)
    assert card.engine.img_per_s > 0


def test_the_page_names_files_figures_and_the_slices(artefacts: Path) -> None:
    page = (artefacts / "card.md").read_text()
    card = Card.load(artefacts)
    for part in (
        "held-out pages 1, 3",
        card.engine.file,
        card.artefacts["onnx_fp16"].sha256[:12],
        "| onnx_fp16 ",
        "| down0_conv1/Conv ",
    ):
        assert part in page


def test_a_recorded_command_makes_the_recorded_file(artefacts: Path, tmp_path: Path) -> None:
    card = Card.load(artefacts)
    command = card.artefacts["onnx_fp16"].command.split()
    assert command[:3] == ["python", "-m", "export.steps.half_precision"]
    (tmp_path / "model.onnx").write_bytes((artefacts / "model.onnx").read_bytes())
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True, capture_output=True)
    assert sha256_of(tmp_path / "model.fp16.onnx") == card.artefacts["onnx_fp16"].sha256


@pytest.mark.skipif(find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_v100_leaves_the_command_and_says_that_the_plan_is_not_built(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "artefacts"
    assert export(model_dir, out, "--data_dir", data_dir, "--target", "v100") == 2
    said = capsys.readouterr().err
    assert f"the ONNX files are proven and in {out}, but there is no TensorRT plan: " in said
    assert str(out / "build_plan.sh") in said
    with pytest.raises(CardError, match="names no engine for a CPU"):
        _ = Card.load(out).engine
    # The script runs from anywhere: here a trtexec that only tells what it was asked for.
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "trtexec").write_text('#!/bin/sh\npwd\necho "$@"\n')
    (tools / "trtexec").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(out / "build_plan.sh")], env=environment, cwd="/", check=True, capture_output=True, text=True
    )
    command = plan_command("model.fp16.onnx", "trtexec.plan", BuildSettings.of((204, 220)))
    assert done.stdout.splitlines() == [str(out), command.split(maxsplit=1)[1]]
    assert "--adopt trtexec.plan" in (out / "build_plan.sh").read_text()


def test_the_shell_command_has_the_settings_of_the_build() -> None:
    assert plan_command("m.onnx", "m.plan", BuildSettings.of((572, 700))) == (
        "trtexec --onnx=m.onnx --saveEngine=m.plan --stronglyTyped --skipInference "
        "--builderOptimizationLevel=5 --profilingVerbosity=detailed --memPoolSize=workspace:2048 "
        "--profile=0 --minShapes=image:1x1x572x572 --optShapes=image:8x1x572x572 --maxShapes=image:16x1x572x572 "
        "--profile=1 --minShapes=image:1x1x700x700 --optShapes=image:8x1x700x700 --maxShapes=image:16x1x700x700"
    )


@pytest.mark.parametrize(
    ("poison", "target", "sentence"),
    [
        pytest.param(np.nan, "cpu", "weights that are NaN or infinite: its training diverged", id="nan"),
        pytest.param(3e6, "v100", "beyond float16's 65504", id="too large", marks=pytest.mark.slow),
    ],
)
def test_a_refused_export_leaves_the_former_artefacts(
    artefacts: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    poison: float,
    target: str,
    sentence: str,
    random_saved_model: Any,
) -> None:
    before = sha256_of(artefacts)
    random_saved_model(tmp_path / "saved_model", poison=poison)
    assert export(tmp_path, artefacts, "--data_dir", data_dir, "--target", target) == 2
    assert sentence in capsys.readouterr().err
    assert sha256_of(artefacts) == before
    assert [path.name for path in artefacts.parent.iterdir()] == [artefacts.name]


def test_a_signed_export_covers_every_file_and_a_bad_key_is_said_before_the_work(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = minisign.KeyPair.generate()
    secret, public, out = tmp_path / "ours.key", tmp_path / "ours.pub", tmp_path / "artefacts"
    secret.write_bytes(bytes(pair.secret_key))
    public.write_bytes(bytes(pair.public_key))
    assert export(model_dir, out, "--data_dir", data_dir, "--sign", public) == 2
    assert capsys.readouterr().err.startswith(f"error: {public} is not a secret key of minisign's")
    assert not out.exists()
    assert export(model_dir, out, "--data_dir", data_dir, "--sign", secret) == 0
    verify(out, public)
    listed = {line.split("  ")[1] for line in (out / "SHA256SUMS").read_text().splitlines()}
    assert {"card.json", "card.md", "model.onnx", "model.fp16.onnx", "saved_model/saved_model.pb"} <= listed
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files - listed == {"SHA256SUMS", "SHA256SUMS.minisig"}


@pytest.mark.slow
def test_a_cpu_is_served_without_the_float16_file_where_that_cannot_be_proven(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], random_saved_model: Any
) -> None:
    random_saved_model(tmp_path / "run" / "saved_model", poison=3e6)
    assert export(tmp_path / "run", tmp_path / "out", "--data_dir", data_dir) == 0
    assert "no model.fp16.onnx, which a CPU does not need: " in capsys.readouterr().out
    card = Card.load(tmp_path / "out")
    assert list(card.artefacts) == ["saved_model", "onnx"]
    assert not (tmp_path / "out" / "model.fp16.onnx").exists()
    assert "beyond float16's 65504" in card.model["half_refused"]
    assert load_engine(card).infer(np.zeros((1, 1, 204, 204), np.uint8)).shape == (1, 1, 20, 20)


def test_folders_that_cannot_be_used_get_one_sentence(
    model_dir: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "file").touch()
    (tmp_path / "run" / "saved_model").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{")
    for words, sentence in (
        ((tmp_path, tmp_path / "new"), "has no saved_model"),
        ((tmp_path / "run", tmp_path / "new"), "config.json is not JSON"),
        ((model_dir, tmp_path), "holds something else than artefacts"),
        ((model_dir, tmp_path / "file"), "holds something else than artefacts"),
        ((model_dir, model_dir), "holds something else than artefacts"),
        ((model_dir, tmp_path / "new", "--tile_sizes", "180"), "180"),
        ((model_dir, tmp_path / "new", "--tile_sizes", "188", "188"), "each once"),
        ((model_dir, tmp_path / "new", "--data_dir", tmp_path), "has no *-volume.tif"),
    ):
        assert export(*words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert sentence in error
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_artefacts_around_the_model_folder_are_not_replaced(
    artefacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A folder of artefacts holds a saved_model itself, so it can be taken for a training run.
    assert export(artefacts, artefacts) == 2
    assert "holds --model_dir, and would be replaced" in capsys.readouterr().err
    assert Card.load(artefacts).verify_engine().is_file()


def test_help_is_quick_and_works_from_anywhere(tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", str(ROOT / "export" / "main.py"), "--help"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--model_dir" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"tensorflow", "onnx", "onnxruntime", "openvino", "tritonclient", "grpc", "scipy", "matplotlib"}


def test_provenance_tells_versions() -> None:
    found = versions("numpy", "no-such-package")
    assert found["numpy"] == np.__version__
    assert "no-such-package" not in found


def test_a_second_export_into_the_folder_is_refused_at_once(
    artefacts: Path, model_dir: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sha256_of(artefacts)
    with sole_writer(artefacts):
        started = time.monotonic()
        assert export(model_dir, artefacts, "--data_dir", data_dir) == 2
        assert time.monotonic() - started < 2
    assert f"another process writes {artefacts}: wait for it" in capsys.readouterr().err
    assert sha256_of(artefacts) == before
    assert [path.name for path in artefacts.parent.iterdir()] == [artefacts.name]


def test_the_lock_ends_with_its_holder_and_its_leftovers_with_the_next_export(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom export.record.folder import sole_writer\n"
        "from unet.files import atomic_directory\nout = Path(sys.argv[1])\n"
        "with sole_writer(out), atomic_directory(out) as aside:\n"
        "    (aside / 'half').touch()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], check=False, cwd=ROOT)
    assert (tmp_path / ".out.lock").exists()
    with (
        sole_writer(tmp_path / "out"),
        pytest.raises(ExportError, match="another process"),
        sole_writer(tmp_path / "out"),
    ):
        pass
    # What it was filling goes when the next export is written.
    assert len(list(tmp_path.iterdir())) == 1
    with sole_writer(tmp_path / "out"), atomic_directory(tmp_path / "out"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGINT,), (signal.SIGINT,) * 2])
@pytest.mark.parametrize("at", ["parameters", "float16 ends"])
def test_an_export_that_is_stopped_leaves_the_former_one_and_nothing_else(
    at: str, numbers: tuple[signal.Signals, ...], artefacts: Path, model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "artefacts"
    shutil.copytree(artefacts, out)
    before = sha256_of(out)
    line = [sys.executable, "export/main.py", "--model_dir", model_dir, "--out", out, "--data_dir", data_dir, *SIZES]
    with subprocess.Popen(list(map(str, line)), cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while at not in process.stdout.readline():
            assert process.poll() is None
        for number in numbers:
            process.send_signal(number)
        process.stdout.read()
    assert process.returncode == 128 + numbers[0]
    assert sha256_of(out) == before
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_export_whose_reader_went_away_writes_everything(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "artefacts"
    line = [sys.executable, "export/main.py", "--model_dir", model_dir, "--out", out, "--data_dir", data_dir, *SIZES]
    with subprocess.Popen(list(map(str, line)), cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert Card.load(out).verify_engine().is_file()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, random_saved_model: Any) -> tuple[Path, Path]:
    """A training run whose held-out slices have labels, and the folder of the stack."""
    pytest.importorskip("nncf", reason="NNCF is not installed")
    import tifffile

    from unet.phantom import synthetic_stack

    folder = tmp_path_factory.mktemp("labelled")
    images, labels = synthetic_stack(slices=4, size=96, seed=3)
    tifffile.imwrite(folder / "train-volume.tif", images, photometric="minisblack")
    tifffile.imwrite(folder / "train-labels.tif", labels * np.uint8(255), photometric="minisblack")
    random_saved_model(folder / "result" / "saved_model", 4)
    rewrite_record(folder / "result", held_out={"train-volume.tif": [1, 3]})
    return folder / "result", folder


def test_8_bits_are_considered_without_a_flag_where_labels_can_judge_them(
    labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    model, data = labelled
    assert export(model, tmp_path / "out", "--data_dir", data) == 0
    card = Card.load(tmp_path / "out")
    assert "openvino int8" in card.model["engines_img_per_s"]
    taken = card.engine.precision == "int8"
    # The file is there, and proven, only if it is what serves.
    assert taken == ("int8" in card.artefacts) == (tmp_path / "out" / "model.int8.zip").exists()
    assert card.fallback is not None
    assert card.fallback.precision == "f32"
    assert card.engine.proof is not None
    assert card.engine.proof.scores is not None
    assert card.engine.img_per_s >= card.fallback.img_per_s


def test_a_diverged_training_is_named_where_slices_are_scored_too(
    labelled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], random_saved_model: Any
) -> None:
    random_saved_model(tmp_path / "saved_model", 4, poison=np.nan)
    shutil.copy(labelled[0] / "config.json", tmp_path)
    assert export(tmp_path, tmp_path / "out", "--data_dir", labelled[1]) == 2
    assert "weights that are NaN or infinite: its training diverged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_slices_that_training_saw_8_bits_are_not_considered(
    labelled: tuple[Path, Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(labelled[0], tmp_path / "result"))
    rewrite_record(model, held_out={"train-volume.tif": [0, 1, 2, 3]})
    assert export(model, tmp_path / "out", "--data_dir", labelled[1]) == 0
    assert "openvino int8" not in Card.load(tmp_path / "out").model["engines_img_per_s"]


def test_8_bits_can_be_asked_for_and_left_out() -> None:
    for flags, int8 in (([], None), (["--int8"], True), (["--no_int8"], False), (["--no-int8"], False)):
        assert parse_arguments(["--model_dir", "result", *flags]).int8 is int8


def test_without_labels_8_bits_are_not_considered(artefacts: Path) -> None:
    assert "openvino int8" not in Card.load(artefacts).model["engines_img_per_s"]
