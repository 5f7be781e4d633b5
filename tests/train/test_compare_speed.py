from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from train.compare_speed import Ratio


def test_a_ratio_is_taken_round_by_round() -> None:
    ratio = Ratio("x / y", "ms", (2.0, 20.0, 6.0), (1.0, 10.0, 2.0))
    assert ratio.rounds == [2.0, 2.0, 3.0]
    assert ratio.median == 2.0
    assert ratio.cells() == ["x / y", "6 / 2 ms", "2.000", "2.000 to 3.000"]


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
    assert len(record["ratios"]) == 5
    for ratio in record["ratios"]:
        assert ratio["name"] in done.stdout
        assert ratio["median"] == ratio["numerators"][0] / ratio["denominators"][0]
        if ratio["unit"] == "ms":
            assert 0 < ratio["numerators"][0] < took_s * 1e3
