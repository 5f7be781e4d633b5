"""What a run's folder allows: a refused command changes no byte of it, and the run's facts are read from it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cards import rewrite_record
from train.config import TrainConfig
from train.errors import TrainError
from train.run.folder import Run

Main = Callable[..., "subprocess.CompletedProcess[str]"]
Contents = Callable[[Path], "dict[str, bytes]"]


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may write into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--exec_mode=train", "--base_filters=2"], "add --resume to continue it, or choose another --model_dir"),
        (["--exec_mode=evaluate", "--crossvalidation_idx=2"], "--crossvalidation_idx 2 contradicts the run in"),
        (["--exec_mode=train", "--resume", "--crossvalidation_idx=2"], "--crossvalidation_idx 2 contradicts the run"),
    ],
)
def test_a_refused_command_changes_no_byte(
    copy: Path, phantom_dir: Path, main: Main, contents: Contents, flags: list[str], sentence: str
) -> None:
    before = contents(copy)
    done = main(*flags, f"--model_dir={copy}", f"--data_dir={phantom_dir}")
    assert done.returncode == 2
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(copy) == before


@pytest.mark.parametrize("mode", ["train", "train_and_evaluate", "predict", "evaluate"])
@pytest.mark.parametrize(
    ("name", "value"), [("crossvalidation_idx", 2), ("seed", 4), ("base_filters", 4), ("validation_share", 0.0)]
)
def test_a_flag_that_contradicts_the_run_is_refused_in_every_mode(
    trained: Path, mode: str, name: str, value: object
) -> None:
    with pytest.raises(TrainError, match=rf"--{name} {value} contradicts the run in .*, which has"):
        Run(trained).configure({"exec_mode": mode, "resume": True, name: value})


def test_the_settings_that_a_command_leaves_out_are_the_runs(trained: Path) -> None:
    config = Run(trained).configure({"exec_mode": "evaluate", "data_dir": "moved", "seed": 3, "tta": True})
    assert (config.base_filters, config.crossvalidation_idx, config.seed, config.max_steps) == (2, 4, 3, 6)
    assert (config.exec_mode, config.data_dir, config.tta) == ("evaluate", "moved", True)


def test_what_changes_in_a_resumed_run_is_said(trained: Path) -> None:
    run = Run(trained)
    config = run.configure({"exec_mode": "train", "resume": True, "max_steps": 9, "learning_rate": 0.5})
    assert run.changes(config) == ["--max_steps 6 -> 9", "--learning_rate 0.001 -> 0.5"]
    assert run.changes(run.configure({"exec_mode": "train", "resume": True})) == []


def test_a_lost_or_garbled_record_is_named(copy: Path) -> None:
    record = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text("{")
    with pytest.raises(TrainError, match=r"config\.json is not the config\.json of a training run"):
        Run(copy)
    (copy / "config.json").write_text(json.dumps({**record, "held_out": {"train-volume.tif": [0]}}))
    with pytest.raises(TrainError, match=r"config\.json is not as a run of this version wrote it"):
        Run(copy)
    # Without its seal it is not what a run wrote either; sealed it is.
    del record["seal"]
    (copy / "config.json").write_text(json.dumps(record))
    with pytest.raises(TrainError, match=r"config\.json is not as a run of this version wrote it"):
        Run(copy)
    rewrite_record(copy)
    assert Run(copy).held_out == {"train-volume.tif": [4]}
    (copy / "config.json").unlink()
    with pytest.raises(TrainError, match="is missing, so what the run held out is not known"):
        Run(copy).configure({"exec_mode": "evaluate"})


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    with Run(tmp_path).locked(), pytest.raises(TrainError, match="another process trains in"), Run(tmp_path).locked():
        pass
    with Run(tmp_path).locked():
        pass


def test_a_run_that_another_process_trained_meanwhile_is_looked_at_again(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.configure({"exec_mode": "train"})
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(TrainError, match=r"another process trained in .* meanwhile"), run.locked():
        pass


def test_everything_is_checked_before_the_first_step(phantom_dir: Path, tmp_path: Path, main: Main) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train-volume.tif", "train-labels.tif"):
        (data / name).symlink_to(phantom_dir / name)
    done = main(f"--data_dir={data}", f"--model_dir={tmp_path / 'run'}", "--base_filters=2", "--tile_size=188")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {data / 'test-volume.tif'} does not exist, and this mode segments it")
    assert not (tmp_path / "run").exists()


def test_a_run_fitted_to_a_budget_keeps_its_steps(trained: Path, tmp_path: Path) -> None:
    shutil.copy(trained / "config.json", tmp_path)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    rewrite_record(tmp_path, fitted=True)
    run = Run(tmp_path)
    config = run.configure({"exec_mode": "train", "resume": True, "max_minutes": 5.0, "max_steps": 1000})
    assert (config.max_steps, config.max_minutes) == (6, 0)
    assert run.changes(dataclasses.replace(config, max_steps=1000, max_minutes=5.0)) == []


def test_the_trained_run_says_what_its_saved_model_is(trained: Path) -> None:
    record = json.loads((trained / "config.json").read_text())
    assert record["held_out"] == {"train-volume.tif": [4]}
    assert record["validation"] == {"train-volume.tif": [2]}
    assert record["trained"]["weights"] == "best"
    assert record["trained"]["threshold_from"] == "validation"
    assert Run(trained).threshold == record["trained"]["threshold"]
    assert isinstance(TrainConfig(**record["settings"]), TrainConfig)
