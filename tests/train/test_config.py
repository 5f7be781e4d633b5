from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.config import TrainConfig, parse_config, parse_flags
from train.errors import TrainError


def test_the_published_flags_keep_their_defaults() -> None:
    config = parse_config([])
    published = {
        "exec_mode": "train_and_predict",
        "batch_size": 1,
        "max_steps": 1000,
        "seed": 0,
        "weight_decay": 0.0005,
        "log_every": 100,
        "warmup_steps": 200,
        "learning_rate": 0.01,
        "momentum": 0.99,
        "decay_steps": 5000,
        "decay_rate": 0.95,
        "augment": False,
        "benchmark": False,
        "use_amp": False,
    }
    assert {name: getattr(config, name) for name in published} == published


def test_flags_and_their_negations() -> None:
    assert parse_config(["--augment", "--use_amp", "--max_steps", "7"]) == TrainConfig(
        augment=True, use_amp=True, max_steps=7
    )
    assert parse_config(["--augment", "--no-augment"]) == TrainConfig()
    assert parse_config(["--max-steps=7", "--augment", "--no_augment"]) == TrainConfig(max_steps=7)
    assert parse_flags(["--no_augment", "--seed=0"]) == {"augment": False, "seed": 0}


@pytest.mark.parametrize(
    ("flags", "trains"),
    [
        (["--exec_mode=train"], True),
        (["--exec_mode=train_and_evaluate"], True),
        (["--exec_mode=evaluate"], False),
        (["--exec_mode=train", "--benchmark"], False),
        (["--exec_mode=train", "--preview_augmentation=x.png"], False),
    ],
)
def test_which_commands_train(flags: list[str], trains: bool) -> None:
    assert parse_config(flags).trains is trains


def test_the_steps_between_validations_follow_the_run() -> None:
    config = parse_config([])
    assert [config.steps_between_validations(steps) for steps in (4, 1991, 5000)] == [100, 200, 500]
    assert parse_config(["--evaluate_every=7"]).steps_between_validations(5000) == 7


def test_a_written_configuration_repeats_the_run(tmp_path: Path) -> None:
    config = TrainConfig(augment=True, max_steps=12, learning_rate=0.003)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"settings": dataclasses.asdict(config)}))
    assert parse_config(["--config", str(path)]) == config
    assert parse_config(["--config", str(path), "--max_steps", "13", "--no-augment"]) == dataclasses.replace(
        config, max_steps=13, augment=False
    )


@pytest.mark.parametrize(
    ("flag", "value", "sentence"),
    [
        ("--tile_size", "570", "the next such size is 572"),
        ("--batch_size", "0", "at least 1"),
        ("--crossvalidation_idx", "5", "0 to 4"),
        ("--dropout", "1", "below 1"),
        ("--validation_share", "1", "below 1"),
        ("--seed", "-1", "--seed is -1; it must be at least 0"),
        ("--seed", "9999999", "it must be at most 2000000"),
        ("--max_minutes", "-1", "at least 0"),
        ("--learning_rate", "nan", "at least 0"),
    ],
)
def test_impossible_values_are_named(flag: str, value: str, sentence: str) -> None:
    with pytest.raises(TrainError, match=sentence):
        parse_config([flag, value])


def test_a_broken_configuration_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(TrainError, match=r"config.json is not the config.json of a training run"):
        parse_config(["--config", str(path)])
    path.write_text('{"settings": {"colour": 1}}')
    with pytest.raises(TrainError, match="does not know: colour"):
        parse_config(["--config", str(path)])


def test_help_does_not_load_tensorflow() -> None:
    code = "import sys; from train.main import main; main(['--help'])"
    check = "import atexit; atexit.register(lambda: print('tensorflow' in __import__('sys').modules)); "
    done = subprocess.run([sys.executable, "-c", check + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--crossvalidation_idx" in done.stdout
    # As the reference document has them.
    assert "--no-augment" in done.stdout
    assert "--no-benchmark" in done.stdout
    assert done.stdout.endswith("False\n")


def test_errors_are_one_sentence_and_exit_code_2(project_root: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(project_root / "train" / "main.py"), "--tile_size", "500"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --tile_size 500 is not 188 + 16k; the next such size is 508\n"


def test_the_global_batch_is_shared_out_or_refused() -> None:
    assert parse_config(["--global_batch_size", "6"]).for_ranks(2).batch_size == 3
    assert parse_config(["--batch_size", "5"]).for_ranks(2).batch_size == 5
    with pytest.raises(TrainError, match="global_batch_size 6 cannot be shared out evenly over 4 ranks"):
        parse_config(["--global_batch_size", "6"]).for_ranks(4)


@pytest.mark.parametrize(("given", "found"), [({}, "1"), ({"TF_ENABLE_ONEDNN_OPTS": "0"}, "0")])
def test_training_takes_onednn_where_nobody_says_otherwise(given: dict[str, str], found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TF_ENABLE_ONEDNN_OPTS"}
    program = "import os, train; print(os.environ['TF_ENABLE_ONEDNN_OPTS'])"
    said = subprocess.run([sys.executable, "-c", program], env={**environment, **given}, capture_output=True, text=True)
    assert said.stdout.strip() == found
