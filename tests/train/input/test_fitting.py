"""With nothing but a folder and a time, the settings follow from what lies there."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from train.config import TrainConfig, parse_flags
from train.input.fitting import Facts, fitted, settings_of
from unet.volume import LabelOptions


def write_stack(folder: Path, slices: int, side: int, membrane: int) -> Path:
    """Labels whose first columns are membrane; half of each slice is not annotated."""
    folder.mkdir(exist_ok=True)
    labels = np.full((slices, side, side + 8), 255, np.uint8)
    labels[:, :, :membrane] = 0
    labels[:, side // 2 :] = 7
    tifffile.imwrite(folder / "train-volume.tif", np.zeros_like(labels), photometric="minisblack")
    tifffile.imwrite(folder / "train-labels.tif", labels, photometric="minisblack")
    return folder


def test_they_follow_from_slices_sides_and_membrane(tmp_path: Path) -> None:
    folder = write_stack(tmp_path / "large", 12, 400, 51)
    facts = Facts.of(str(folder), LabelOptions(ignore_label=7))
    assert (facts.slices, facts.side, facts.annotated) == (12, 400, 0.5)
    assert facts.membrane == pytest.approx(51 / 408)
    given = {"data_dir": str(folder), "ignore_label": 7}
    settings, _ = fitted(given, 40.0)
    config = TrainConfig(**settings)
    assert (config.tile_size, config.crossvalidation_idx, config.exec_mode) == (444, 4, "train_and_evaluate")
    # One pixel in eight is membrane, so an error there costs the root of seven.
    assert config.membrane_weight == 2.6
    assert (config.max_minutes, config.ignore_label) == (40.0, 7)
    # A flag counts.
    assert fitted({**given, "tile_size": 572}, 40.0)[0]["tile_size"] == 572
    few, _ = fitted({"data_dir": str(write_stack(tmp_path / "few", 6, 96, 52)), "ignore_label": 7}, 1.0)
    assert (few["tile_size"], few["crossvalidation_idx"], few["exec_mode"]) == (284, -1, "train")
    assert few["membrane_weight"] == 1.0


def test_a_run_writes_them_and_its_resumption_keeps_them(
    phantom_dir: Path, tmp_path: Path, main: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    run = tmp_path / "run"
    line = ["--minutes=0.02", f"--data_dir={phantom_dir}", f"--model_dir={run}", "--base_filters=2", "--max_steps=2"]
    done = main(*line)
    assert done.returncode == 0, done.stderr
    assert "5 slices, 96 pixels on their shorter side, 100% annotated" in done.stdout
    assert "so, where nothing else is asked for: --augment --use_amp --batch_size 2 --optimizer adam" in done.stdout
    assert "--max_steps" not in done.stdout
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))["settings"]
    assert (settings["tile_size"], settings["optimizer"], settings["base_filters"]) == (284, "adam", 2)
    given = {"model_dir": str(run), "resume": True, "minutes": 1.0}
    assert settings_of(dict(given)) == {
        "model_dir": str(run),
        "resume": True,
        "max_minutes": 1.0,
        "exec_mode": "train",
    }
    assert settings_of({"seed": 1}) == {"seed": 1}


def test_a_time_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_flags(["--minutes=-1"], minutes=True)
    assert "--minutes must be positive" in capsys.readouterr().err
