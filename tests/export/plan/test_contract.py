"""The whole way of a plan, on the contract of TensorRT and pycuda as their real bindings have it."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.errors import ExportError, ParityError
from export.gpu_report import main as report_main
from export.plan.build import build_into, main
from export.plan.serialize import build_plan
from export.plan.settings import BuildSettings
from serve.models.config import ModelSettings, RepositoryError
from serve.models.publish import publish
from tests.cards import sealed
from tests.export.plan import contract
from tests.export.plan.conftest import SIZES
from tests.export.plan.contract import Cuda, Faults, Tensorrt
from unet.card import Card, CardError
from unet.engine import EngineError
from unet.engine.library import BuildLog, load_library
from unet.engine.plan import PlanRunner
from unet.files import sha256_of

NAMES = Path(__file__).parent / "tensorrt_names"
SETTINGS = BuildSettings.of(SIZES)


def silent(_: str) -> None:
    pass


def promised(owner: Any, method: str) -> set[tuple[str, ...]]:
    """The argument names of a method's overloads, out of the docstring that its binding carries."""
    doc = inspect.getdoc(getattr(owner, method)) or ""
    found = re.findall(rf"^(?:\d+\. )?{method}\(self: [^,)]*(?:, (.*))?\) -> ", doc, re.MULTILINE)
    return {tuple(re.findall(r"(?:^|, )(\w+): ", arguments)) for arguments in found}


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (owner, name)
        for owner in ("IExecutionContext", "ICudaEngine", "IOptimizationProfile", "IBuilderConfig", "Builder")
        for name, member in vars(getattr(contract, owner)).items()
        if inspect.isfunction(member)
        and name != "infer"
        and name in inspect.getsource(build_plan) + inspect.getsource(PlanRunner)
    ],
)
def test_each_call_has_the_arguments_of_the_real_binding(owner: str, method: str) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: make install-rtx")
    ours = tuple(inspect.signature(getattr(getattr(contract, owner), method)).parameters)[1:]
    theirs = promised(getattr(rtx, owner), method)
    if theirs:  # some carry no signature
        assert any(ours == known[: len(ours)] for known in theirs), theirs


@pytest.mark.parametrize("release", ["10.4.0", "11.4.0"])
def test_a_refused_profile_is_an_exception_in_the_real_bindings(release: str) -> None:
    recorded = (NAMES / f"{release}.txt").read_text(encoding="utf-8")
    assert "# raises: Error in set optimization profile async." in recorded


@pytest.fixture
def plan(cuda: Cuda, artefacts: Path) -> bytes:
    return build_plan(load_library("tensorrt"), artefacts / "model.fp16.onnx", SETTINGS, BuildLog())


def test_sizes_and_batches_follow_each_other_on_one_plan(cuda: Cuda, plan: bytes) -> None:
    rng = np.random.default_rng(0)
    with PlanRunner(plan, load_library("tensorrt")) as runner:
        assert (runner.tile_sizes, runner.max_batch_size) == (SIZES, 16)
        assert runner.profiles[0] == ((1, 1, 284, 284), (8, 1, 284, 284), (16, 1, 284, 284))
        due = runner._engine.infer  # type: ignore[attr-defined]
        for batch, size in ((1, 284), (3, 300), (2, 284), (1, 300)):
            image = rng.integers(0, 256, (batch, 1, size, size), np.uint8)
            np.testing.assert_array_equal(runner.infer(image), due(image))
        assert len(cuda.allocated) == 2


@pytest.mark.parametrize(
    ("shape", "kind", "sentence"),
    [
        ((1, 1, 572, 572), np.uint8, r"takes tiles of 284, 300 in batches of 1 to 16, not 1 of 572"),
        ((17, 1, 284, 284), np.uint8, "not 17 of 284"),
        ((0, 1, 284, 284), np.uint8, "not 0 of 284"),
        ((1, 1, 284, 300), np.uint8, r"must be square, uint8 \[N, 1, S, S\], these are uint8 of \[1, 1, 284, 300\]"),
        ((1, 284, 284), np.uint8, "must be square"),
        ((1, 1, 284, 284), np.float32, "these are float32"),
    ],
)
def test_what_is_no_batch_of_the_plan_gets_one_sentence(plan: bytes, shape: Any, kind: Any, sentence: str) -> None:
    with PlanRunner(plan, load_library("tensorrt")) as runner, pytest.raises(EngineError, match=sentence):
        runner.infer(np.zeros(shape, kind))


def test_a_profile_that_is_refused_is_told_and_not_taken_for_set(plan: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with PlanRunner(plan, load_library("tensorrt")) as runner:
        tile = np.zeros((1, 1, 300, 300), np.uint8)
        runner.infer(tile)
        monkeypatch.setattr(runner, "tile_sizes", (1, 2, 284, 300))
        with pytest.raises(EngineError, match="does not change to the profile of tiles of 284"):
            runner.infer(np.zeros((1, 1, 284, 284), np.uint8))
        monkeypatch.setattr(runner, "tile_sizes", SIZES)
        assert runner.infer(tile).shape == (1, 1, 116, 116)


def test_what_fails_while_loading_leaves_nothing_on_the_gpu(cuda: Cuda, plan: bytes) -> None:
    with pytest.raises(EngineError, match="cannot load the plan: Serialization assertion magicTagRead failed"):
        PlanRunner(b"not a plan at all", load_library("tensorrt"))
    Faults.current.no_context = True
    with pytest.raises(EngineError, match="the GPU cannot hold what the plan needs"):
        PlanRunner(plan, load_library("tensorrt"))
    assert cuda.contexts == []


def test_a_build_without_a_timing_cache_is_only_slower(cuda: Cuda, artefacts: Path, tmp_path: Path) -> None:
    Faults.current.no_timing_cache = True
    settings = BuildSettings.of(SIZES, tmp_path / "timing")
    assert build_plan(load_library("tensorrt"), artefacts / "model.fp16.onnx", settings, BuildLog())
    assert not (tmp_path / "timing").exists()


def test_a_plan_is_proven_where_it_is_built_and_only_then_published(
    cuda: Cuda, artefacts: Path, data_dir: Path, tmp_path: Path
) -> None:
    assert main(["--artefacts", str(artefacts), "--target", "v100", "--data_dir", str(data_dir)]) == 0
    card = Card.load(artefacts)
    entry = card.artefacts["plan"]
    assert entry.proof is not None
    assert (entry.parent, entry.versions["tensorrt"], entry.proof.device) == ("onnx_fp16", "10.4.0", "gpu 7.0")
    against = [(row["step"], row["against"]) for row in entry.proof.comparisons]
    assert against[:2] == [("plan", "onnx"), ("plan", "onnx_fp16")]
    assert ("plan, batches of 1 to 16 tiles of 300", "onnx_fp16") in against
    assert entry.facts["max_batch_size"] == 16
    page = (artefacts / "card.md").read_text()
    assert re.search(rf"\| model\.plan +\| `{entry.sha256[:12]}` +\| onnx_fp16 +\|", page)
    version = publish(artefacts, tmp_path / "models", ModelSettings(profile="v100"))
    assert (version.path / "model.plan").read_bytes() == (artefacts / "model.plan").read_bytes()


def swapped(answer: Any) -> Any:
    return answer[::-1] if len(answer) == 16 else answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (swapped, "plan, batch of 16 tiles of 284"),
        (lambda answer: answer * np.float16(0.9), "plan does not agree with onnx"),
        (lambda answer: answer + np.float16(np.nan), "NaN"),
    ],
    ids=["swapped", "wrong", "nan"],
)
def test_a_plan_that_computes_something_else_is_not_kept(
    cuda: Cuda, artefacts: Path, data_dir: Path, answer: Any, sentence: str
) -> None:
    before = sha256_of(artefacts / "card.json")
    Faults.current.answer = answer
    with pytest.raises(ParityError, match=sentence):
        build_into(artefacts, "v100", silent, data_dir=data_dir)
    assert sha256_of(artefacts / "card.json") == before
    assert not (artefacts / "model.plan").exists()


def test_a_plan_of_trtexec_is_adopted_by_one_command(
    cuda: Cuda, plan: bytes, artefacts: Path, data_dir: Path, tmp_path: Path
) -> None:
    (artefacts / "trtexec.plan").write_bytes(plan)
    line = ["--artefacts", str(artefacts), "--data_dir", str(data_dir), "--adopt", str(artefacts / "trtexec.plan")]
    assert main(line) == 0
    entry = Card.load(artefacts).artefacts["plan"]
    assert entry.command == "python -m export.plan.build --artefacts . --target v100 --adopt trtexec.plan"
    assert publish(artefacts, tmp_path / "models", ModelSettings(profile="v100")).version == 1


@pytest.mark.parametrize("content", [b"not a plan at all", None], ids=["no plan", "missing"])
def test_what_is_no_plan_is_not_adopted(
    cuda: Cuda, artefacts: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (artefacts / "trtexec.plan").write_bytes(content)
    assert main(["--artefacts", str(artefacts), "--adopt", str(artefacts / "trtexec.plan")]) == 2
    assert re.search("cannot load the plan|cannot be read", capsys.readouterr().err)
    assert "plan" not in Card.load(artefacts).artefacts
    assert not (artefacts / "model.plan").exists()


def test_a_plan_of_other_tiles_is_not_adopted(cuda: Cuda, artefacts: Path) -> None:
    other = build_plan(load_library("tensorrt"), artefacts / "model.fp16.onnx", BuildSettings.of((204,)), BuildLog())
    (artefacts / "trtexec.plan").write_bytes(other)
    with pytest.raises(ExportError, match=r"the plan is for tiles of \[204\], the artefacts for \[284, 300\]"):
        build_into(artefacts, "v100", silent, adopt=artefacts / "trtexec.plan")


def test_a_card_takes_no_plan_without_proof_and_none_of_another_kind_of_gpu_is_published(
    cuda: Cuda, artefacts: Path, data_dir: Path, tmp_path: Path
) -> None:
    card = Card.load(artefacts)
    (artefacts / "model.plan").write_bytes(b"not a plan at all")
    with pytest.raises(CardError, match="has no proof"):
        card.record("plan", artefacts / "model.plan", "onnx_fp16", "by hand")
    build_into(artefacts, "v100", silent, data_dir=data_dir)
    with pytest.raises(RepositoryError, match=r"max_batch_size is 64, the plan takes batches of at most 16"):
        publish(artefacts, tmp_path / "models", ModelSettings(profile="v100", max_batch_size=64))
    text = (artefacts / "card.json").read_text()
    (artefacts / "card.json").write_text(
        sealed(json.loads(text.replace('"tensorrt": "10.4.0"', '"tensorrt": "10.7.0"')))
    )
    with pytest.raises(RepositoryError, match=r"built by TensorRT 10\.7\.0, Triton 24\.09 .* has 10\.4\.0"):
        publish(artefacts, tmp_path / "models", ModelSettings(profile="v100"))
    (artefacts / "card.json").write_text(sealed(json.loads(text.replace('"device": "gpu 7.0"', '"device": "gpu 8.6"'))))
    with pytest.raises(CardError, match=r"was proven on gpu 8\.6, and is to be served on gpu 7\.0"):
        publish(artefacts, tmp_path / "models", ModelSettings(profile="v100"))
    (artefacts / "card.json").write_text(
        sealed(json.loads(text.replace('"context_bytes": 1048576', '"context_bytes": 4294967296')))
    )
    with pytest.raises(RepositoryError, match=r"4 execution contexts, 2 instances of 2 profiles, .* 16 GiB"):
        publish(artefacts, tmp_path / "models", ModelSettings(profile="v100"))


def test_an_export_that_landed_while_a_plan_was_built_keeps_its_card(
    cuda: Cuda, artefacts: Path, data_dir: Path, tmp_path: Path
) -> None:
    """The folder is exchanged, as by a process that does not know the lock: the plan is of another network then."""
    newer = Path(shutil.copytree(artefacts, tmp_path / "newer"))
    (newer / "model.fp16.onnx").write_bytes((newer / "model.onnx").read_bytes())

    def landing(answer: Any) -> Any:
        if newer.exists():
            artefacts.rename(tmp_path / "older")
            newer.rename(artefacts)
        return answer

    Faults.current.answer = landing
    with pytest.raises((CardError, FileNotFoundError)):
        build_into(artefacts, "v100", silent, data_dir=data_dir)
    assert "plan" not in Card.load(artefacts).artefacts


def test_the_report_of_a_gpu(cuda: Cuda, artefacts: Path, data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--artefacts", str(artefacts), "--data_dir", str(data_dir), "--seconds", "0.01"]
    assert report_main(line) == 0
    text = (artefacts / "gpu_report.md").read_text()
    assert text.startswith("# The plan on Tesla V100-SXM2-16GB")
    assert len(re.findall(r"\n\| +284 \|", text)) == len(re.findall(r"\n\| +300 \|", text)) == 3
    assert "plan, batches of 1 to 16 tiles of 284 against onnx_fp16" in text
    assert text in capsys.readouterr().out


def test_a_plan_of_another_tensorrt_is_not_run(
    cuda: Cuda, artefacts: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    build_into(artefacts, "v100", silent, data_dir=data_dir)
    monkeypatch.setitem(sys.modules, "tensorrt", Tensorrt(cuda, "10.5.0"))
    with pytest.raises(EngineError, match=r"built by TensorRT 10\.4\.0, this machine has 10\.5\.0"):
        PlanRunner.load(artefacts)
