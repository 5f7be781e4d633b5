from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.gate.parity import ParityError
from export.gpu_report import parity, report, samples
from export.pipeline import ExportConfig, export_model
from export.plan.build import keep_plan
from export.provenance import PAGE
from unet.card import Card
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.names import HALF_FILE, ONNX_FILE, PLAN_FILE

SIZES = (284, 300)


@pytest.fixture(scope="module")
def card(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Card:
    out = tmp_path_factory.mktemp("report") / "artefacts"
    return export_model(ExportConfig(model_dir, out, data_dir, "v100", SIZES), lambda _: None)


class Runner:
    """A real engine in the plan's place, which may go wrong from some batch size on, as TensorRT has been known to."""

    max_batch_size = 16

    def __init__(self, path: Path, wrong_from: int = 99) -> None:
        self._engine = CpuEngine(path, EngineChoice("openvino", "f32"))
        self._wrong_from = wrong_from

    def infer(self, image: Any) -> Any:
        answer = self._engine.infer(image)
        return answer[::-1] if len(image) >= self._wrong_from else answer


def test_every_batch_size_is_compared_with_both_files(card: Card, data_dir: Path) -> None:
    found = samples(card, data_dir, 16)
    assert [sample.tiles.shape for sample in found] == [(16, 1, size, size) for size in SIZES]
    assert len({tile.tobytes() for tile in found[0].tiles}) >= 8
    comparisons = parity(Runner(card.folder / HALF_FILE), found)
    assert [one.against for one in comparisons] == [ONNX_FILE, HALF_FILE] * 2
    for one in comparisons:
        one.check()
    text = report(
        "Tesla V100",
        [dict.fromkeys(("tile_size", "batch_size", "img_per_s", "p50_ms", "p95_ms", "p99_ms"), 8.0)],
        comparisons,
    )
    assert "| 8 | 8 | 8.00 | 8.00 | 8.00 | 8.00 |" in re.sub(" +", " ", text)
    assert text.count("plan, batch ") == 4


def test_a_fault_at_one_batch_size_is_found(card: Card, data_dir: Path) -> None:
    comparisons = parity(Runner(card.folder / HALF_FILE, wrong_from=8), samples(card, data_dir, 16))
    with pytest.raises(ParityError, match=r"plan, batch (8|9|1\d) of 284 does not agree"):
        comparisons[0].check()


def test_a_plan_shows_on_the_card_and_on_its_page(card: Card, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(card.folder, tmp_path / "artefacts"))
    assert PLAN_FILE not in (folder / PAGE).read_text()
    command = "python -m export.plan.build --artefacts . --target v100"
    keep_plan(Card.load(folder), b"layers", "{}", command, {"tensorrt": "10.4.0"}, compute_capability="7.0")
    found = Card.load(folder)
    for name in found.artefacts:
        found.verify(name)
    entry = found.artefacts["plan"]
    assert (entry.parent, entry.versions["tensorrt"], entry.facts["compute_capability"]) == (
        "onnx_fp16",
        "10.4.0",
        "7.0",
    )
    assert f"| {PLAN_FILE} | `{entry.sha256[:12]}` | onnx_fp16 | `{command}` |" in re.sub(
        " +", " ", (folder / PAGE).read_text()
    )


def test_without_a_gpu_it_is_one_sentence(card: Card, project_root: Path) -> None:
    line = [sys.executable, "export/gpu_report.py", "--artefacts", str(card.folder), "--target", "v100"]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")


@pytest.mark.gpu
def test_a_plan_is_built_proven_and_run(model_dir: Path, data_dir: Path, tmp_path: Path) -> None:
    from export.plan.build import build_into
    from export.plan.targets import TARGETS
    from unet.engine.device import gpu
    from unet.engine.plan import PlanRunner, benchmark

    target = next(name for name, one in TARGETS.items() if one.compute_capability == gpu().compute_capability)
    card = export_model(ExportConfig(model_dir, tmp_path / "artefacts", data_dir, target, SIZES), lambda _: None)
    build_into(card.folder, target)
    assert (card.folder / "plan.json").stat().st_size > 100
    assert PLAN_FILE in (card.folder / PAGE).read_text()
    with PlanRunner(card.folder) as runner:
        for one in parity(runner, samples(Card.load(card.folder), data_dir, 16)):
            one.check()
        rows = benchmark(runner, 0.2)
    assert len(rows) == 3 * len(SIZES)
    assert np.all([row["img_per_s"] > 0 for row in rows])
