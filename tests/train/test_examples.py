"""Each example script, run for real with a tiny network; those for eight GPUs on two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unet.machine import cpu_amp_dtype

TINY = "--base_filters 2 --tile_size 204 --max_steps 3 --warmup_steps 1 --log_every 1"
NAMES = [
    *(f"unet_{precision}_{gpus}GPU.sh" for precision in ("FP32", "TF-AMP") for gpus in (1, 8)),
    *(f"unet_TRAIN_BENCHMARK_{precision}_{gpus}GPU.sh" for precision in ("FP32", "TF-AMP") for gpus in (1, 8)),
    *(f"unet_INFER_BENCHMARK_{precision}.sh" for precision in ("FP32", "TF-AMP")),
]


def test_the_list_is_complete(project_root: Path) -> None:
    found = {path.name for path in (project_root / "train" / "examples").glob("unet_*.sh")}
    assert found == set(NAMES)


def run(script: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
    line = [str(script), *(str(argument) for argument in arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=240)


# One of each kind, on one rank and on two; the others differ in a flag.
QUICK = {
    "unet_TF-AMP_1GPU.sh",
    "unet_FP32_8GPU.sh",
    "unet_TRAIN_BENCHMARK_TF-AMP_8GPU.sh",
    "unet_INFER_BENCHMARK_FP32.sh",
}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_runs(name: str, project_root: Path, phantom_dir: Path, tmp_path: Path) -> None:
    ranks = 2 if "8GPU" in name else 1
    script = project_root / "train" / "examples" / name
    done = run(
        script, project_root / "train", phantom_dir, tmp_path / "result", "2", UNET_RANKS=str(ranks), UNET_FLAGS=TINY
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "result" / "log.json").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line[len("DLLL ") :]) for line in lines]
    precision = "mixed_bfloat16" if "TF-AMP" in name and cpu_amp_dtype() == "bfloat16" else "float32"
    assert f"{ranks} ranks x 2 windows" in done.stdout
    assert precision in done.stdout
    last = events[-1]["data"]
    if "BENCHMARK" in name:
        kind = "training" if "TRAIN" in name else "inference"
        # Two measured steps of two windows on each rank.
        assert last[f"{kind}_images"] == 2 * 2 * ranks
        assert last[f"{kind}_img_per_s"] > 0
    else:
        assert events[0]["data"]["augment"] is True
        assert (tmp_path / "result" / "eval" / "test-probability.tif").exists()


def test_a_wrong_call_says_how(project_root: Path, tmp_path: Path) -> None:
    script = project_root / "train" / "examples" / NAMES[0]
    done = run(script)
    assert (done.returncode, done.stderr.split(":")[0]) == (2, "usage")
    done = run(script, tmp_path, tmp_path, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/main.py does not exist")
