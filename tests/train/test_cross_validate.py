from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train.config import config_of
from train.cross_validate import Fold, main
from train.errors import TrainError

LINE = [sys.executable, "train/cross_validate.py"]
FLAGS = ["--base_filters=2", "--tile_size=188", "--max_steps=2", "--checkpoint_every=1"]


def run(project_root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*LINE, *flags], cwd=project_root, capture_output=True, text=True, check=False)


def test_a_wrong_flag_is_named_before_anything_is_trained(project_root: Path, tmp_path: Path) -> None:
    done = run(project_root, f"--model_dir={tmp_path / 'folds'}", "--max_steps=0")
    assert done.returncode == 2
    assert done.stderr == "error: --max_steps is 0; it must be at least 1\n"
    assert not (tmp_path / "folds").exists()


@pytest.mark.parametrize("flag", ["--crossvalidation_idx=2", "--exec_mode=train", "--resume"])
def test_what_is_set_for_each_fold_is_no_flag(project_root: Path, tmp_path: Path, flag: str) -> None:
    if flag != "--resume":
        assert main([f"--model_dir={tmp_path}", flag]) == 2
        return
    done = run(project_root, f"--model_dir={tmp_path}", flag)
    assert done.stderr == "error: --resume is set for each fold here: leave it out\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_other_settings_is_refused(trained: Path, phantom_dir: Path, tmp_path: Path) -> None:
    """The scores of that run would be printed as those of this one."""
    shutil.copytree(trained, tmp_path / "fold-4")
    fold = Fold(4, tmp_path / "fold-4")
    settings = json.loads((trained / "config.json").read_text())["settings"]
    fold.check(config_of(settings))
    with pytest.raises(TrainError, match=r"other settings \(--max_steps 6 -> 7, --augment False -> True\)"):
        fold.check(config_of({**settings, "max_steps": 7, "augment": True}))


def test_settings_that_follow_from_the_data_are_the_folds_own(
    trained: Path, phantom_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They choose a mode and a fold, which nobody gave as a flag."""
    shutil.copytree(trained, tmp_path / "fold-4")
    assert main([f"--model_dir={tmp_path}", f"--data_dir={phantom_dir}", "--minutes=1"]) == 2
    assert "fold-4 holds a run of other settings" in capsys.readouterr().err


def test_scores_of_trained_slices_are_no_scores_of_a_fold(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "fold-4")
    fold = Fold(4, tmp_path / "fold-4")
    (path,) = (tmp_path / "fold-4" / "eval").glob("scores-*.json")
    record = json.loads(path.read_text())
    assert fold.scores()["v_rand_at_threshold"] == record["v_rand_at_threshold"]
    path.write_text(json.dumps({**record, "held_out": False}))
    with pytest.raises(TrainError, match="has scores of slices that were trained on"):
        fold.scores()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_fold_is_trained_once_and_scored(project_root: Path, phantom_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "folds"
    flags = [f"--model_dir={out}", f"--data_dir={phantom_dir}", *FLAGS]
    # A fold that has lost its scores, and so was not finished, goes on; the others are read.
    for lost in (None, "fold-3"):
        if lost is not None:
            shutil.rmtree(out / lost / "eval")
            made = {path: os.stat(path).st_mtime_ns for path in out.glob("fold-*/eval/*.json")}
        done = run(project_root, *flags)
        assert done.returncode == 0, done.stderr
        with (out / "folds.csv").open(newline="") as stream:
            rows = {row["fold"]: row for row in csv.DictReader(stream)}
        assert list(rows) == ["0", "1", "2", "3", "4", "mean", "standard deviation"]
        scores = [json.loads(path.read_text()) for path in sorted(out.glob("fold-*/eval/scores-96x96.json"))]
        assert [one["held_out"] for one in scores] == [True] * 5
        for name in ("best_v_rand", "dice"):
            values = [one[name] for one in scores]
            assert float(rows["mean"][name]) == pytest.approx(np.mean(values))
            assert float(rows["standard deviation"][name]) == pytest.approx(np.std(values, ddof=1))
        (mean,) = [line for line in done.stdout.splitlines() if line.strip("| ").startswith("mean ")]
        assert f"{float(rows['mean']['best_v_rand']):.4f}" in mean.split()
    assert done.stdout.count("scored already") == 4
    assert {path: os.stat(path).st_mtime_ns for path in made} == made
    held_out = [json.loads((out / f"fold-{k}" / "config.json").read_text())["held_out"] for k in range(5)]
    assert [pages["train-volume.tif"] for pages in held_out] == [[0], [1], [2], [3], [4]]
