from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.compare_speed import Ratio, ratios_of, step_gflop
from train.config import config_of
from unet.machine import cpu_amp_dtype


def test_a_ratio_is_taken_round_by_round() -> None:
    ratio = Ratio("x / y", "ms", (2.0, 20.0, 6.0), (1.0, 10.0, 2.0))
    assert ratio.rounds == [2.0, 2.0, 3.0]
    assert ratio.median == 2.0
    assert ratio.cells() == ["x / y", "6 / 2 ms", "2.000", "2.000 to 3.000"]


def test_the_arithmetic_of_a_step_is_that_of_its_convolutions() -> None:
    # 300.86 GFLOP for a tile of 572 at 64 filters, and 18.88 at 16; backward is twice as much.
    for filters, forward in ((64, 300.86), (16, 18.88)):
        found = step_gflop(config_of({"base_filters": filters, "tile_size": 572, "batch_size": 2}))
        assert found == pytest.approx(3 * 2 * forward, rel=1e-3)


def test_a_step_is_compared_with_a_matrix_product_by_arithmetic_a_second() -> None:
    found = {
        "ours float32": [0.5], "Keras float32": [1.0], "product float32": [200.0], "window True": [2.0],
        "window False": [1.0], "2 ranks": [3.0], "1 ranks": [4.0],
    }  # fmt: skip
    rows = {ratio.name: ratio.median for ratio in ratios_of(found, ["float32"], gflop=60.0)}
    assert rows["our step / matrix product, float32"] == pytest.approx(0.6)
    assert rows["2 ranks / 1 process, batch 2 in all, float32"] == pytest.approx(0.75)
    assert len(rows) == 4


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_command_measures_all_ratios(project_root: Path, phantom_dir: Path, tmp_path: Path) -> None:
    line = [sys.executable, "train/compare_speed.py", f"--out={tmp_path / 'speed.json'}", f"--data_dir={phantom_dir}"]
    settings = ["--rounds=1", "--steps=2", "--base_filters=2", "--tile_size=188"]
    started = time.perf_counter()
    done = subprocess.run([*line, *settings], cwd=project_root, capture_output=True, text=True, check=False)
    took_s = time.perf_counter() - started
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "speed.json").read_text())
    assert len(record["ratios"]) == (7 if cpu_amp_dtype() == "bfloat16" else 4)
    for ratio in record["ratios"]:
        assert ratio["name"] in done.stdout
        assert ratio["median"] == ratio["numerators"][0] / ratio["denominators"][0]
        if ratio["unit"] == "ms":
            assert 0 < ratio["numerators"][0] < took_s * 1e3
