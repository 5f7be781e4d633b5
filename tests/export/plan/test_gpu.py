"""The way of a plan on a real GPU, and on a machine without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import numpy as np
import pytest

from export.gpu_report import main as report_main
from export.plan.build import build_into
from unet.card import Card
from unet.engine.device import gpu
from unet.engine.plan import PlanRunner, benchmark
from unet.engine.targets import TENSORRT, target_of


@pytest.mark.skipif(find_spec("pycuda") is not None, reason="pycuda is installed")
@pytest.mark.parametrize("program", [["export/gpu_report.py"], ["-m", "export.plan.build"]])
def test_without_a_gpu_it_is_one_sentence(for_v100: Path, project_root: Path, program: list[str]) -> None:
    line = [sys.executable, *program, "--artefacts", str(for_v100), "--target", "v100"]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")


@pytest.mark.skipif(which("nvidia-smi") is not None, reason="there is a GPU's driver")
def test_what_is_missing_is_said_before_anything_is_installed(
    for_v100: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert report_main(["--check"]) == 2
    assert "artefacts/card.json does not exist" in capsys.readouterr().err
    # What `make demo` made is taken where nothing else is named.
    shutil.copytree(for_v100, tmp_path / "demo" / "artefacts")
    assert report_main(["--check"]) == 2
    assert "no NVIDIA GPU answers" in capsys.readouterr().err


@pytest.mark.gpu
def test_a_plan_is_built_proven_and_run(artefacts: Path, data_dir: Path) -> None:
    target = target_of(gpu().compute_capability)
    assert target is not None
    build_into(artefacts, target.name, lambda _: None, data_dir=data_dir)
    assert (artefacts / "plan.json").stat().st_size > 100
    proof = Card.load(artefacts).artefacts["plan"].proof
    assert proof is not None
    assert proof.device == f"gpu {target.compute_capability}"
    with PlanRunner.load(artefacts) as runner:
        rows = benchmark(runner, 0.2)
    assert np.all([row["img_per_s"] > 0 for row in rows])


def test_the_report_installs_tensorrt_and_pycuda_of_fixed_versions(project_root: Path) -> None:
    done = subprocess.run(["make", "-n", "v100-report"], cwd=project_root, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    (installs,) = (number for number, line in enumerate(lines) if "'.[gpu]'" in line)
    checks, reports = (number for number, line in enumerate(lines) if "export/gpu_report.py" in line)
    assert "--check" in lines[checks]
    assert checks < installs < reports
    fixed = (project_root / "constraints.txt").read_text(encoding="utf-8")
    for package in ("tensorrt", "tensorrt-cu12", "pycuda", "cuda-python"):
        assert f"\n{package}==" in fixed
    assert f"\ntensorrt=={TENSORRT}" in fixed
