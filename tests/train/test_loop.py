from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from train.checkpoints import CheckpointError, Checkpoints
from train.cluster import Cluster
from train.config import ConfigError, TrainConfig
from train.input.dataset import Slice
from train.log import RunLog, read_log
from train.loop import TrainingError, describe_precision, make_optimizer, precision_of, train
from train.model.network import build_unet
from train.model.schedule import Schedule
from unet.machine import cpu_amp_dtype

Make = Callable[..., TrainConfig]


def run(config: TrainConfig, slices: list[Slice]) -> list[np.ndarray]:  # type: ignore[type-arg]
    """Train and return the weights."""
    weights: list[np.ndarray] = train(  # type: ignore[type-arg]
        config, Cluster(), RunLog(config.model_dir, active=True), slices, slices[:1]
    ).model.get_weights()
    return weights


def flags_of(config: TrainConfig) -> list[str]:
    """The command's flags for a configuration."""
    values = dataclasses.asdict(config).items()
    switches = [f"--{name}" if value else f"--no-{name}" for name, value in values if isinstance(value, bool)]
    return [*switches, *(f"--{name}={value}" for name, value in values if not isinstance(value, bool))]


def run_command(config: TrainConfig, project_root: Path) -> subprocess.Popen[str]:
    """Start the trainer in a process of its own."""
    line = [sys.executable, str(project_root / "train" / "main.py"), *flags_of(config)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


def test_training_lowers_the_loss(tiny: Make, slices: list[Slice]) -> None:
    config = tiny(max_steps=60, log_every=10, batch_size=2, tile_size=220, learning_rate=3e-3, base_filters=4)
    run(config, slices)
    events = [json.loads(line[5:]) for line in Path(config.model_dir, "log.json").read_text().splitlines()]
    losses = [event["data"]["loss"] for event in events if "loss" in event["data"]]
    assert len(losses) >= 6  # on a busy machine a line comes after some seconds too
    assert losses[-1] < 0.8 * losses[0]


def test_resumed_run_equals_uninterrupted_one(tiny: Make, slices: list[Slice], tmp_path: Path) -> None:
    common = {"max_steps": 6, "checkpoint_every": 3, "augment": True, "lr_schedule": "cosine"}
    whole = run(tiny(model_dir=str(tmp_path / "whole"), **common), slices)
    halves = tiny(model_dir=str(tmp_path / "halves"), **common)
    run(halves, slices)
    newest = tmp_path / "halves" / "checkpoints" / "step-00000006"
    # As a power cut leaves it: the newest checkpoint is damaged, so training goes on from the one before.
    (newest / "state.data-00000-of-00001").write_bytes(b"")
    resumed = run(dataclasses.replace(halves, resume=True), slices)
    for left, right in zip(whole, resumed):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-7)


def test_resume_begins_where_there_is_nothing_to_go_on_from(tiny: Make, slices: list[Slice], tmp_path: Path) -> None:
    # As a job that is always started with --resume, whether for the first time or again.
    plain, resumed = (
        run(tiny(model_dir=str(tmp_path / f"resume-{resume}"), resume=resume), slices) for resume in (False, True)
    )
    for left, right in zip(plain, resumed):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-7)
    for state in (tmp_path / "resume-True" / "checkpoints").glob("step-*/state.data*"):
        state.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no usable checkpoint"):
        run(tiny(model_dir=str(tmp_path / "resume-True"), resume=True), slices)


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(
    tiny: Make, slices: list[Slice], project_root: Path, tmp_path: Path
) -> None:
    common = {"max_steps": 24, "checkpoint_every": 3, "log_every": 1, "augment": True, "dropout": 0.5}
    whole = run_command(tiny(model_dir=str(tmp_path / "whole"), **common), project_root)
    assert whole.wait() == 0
    config = tiny(model_dir=str(tmp_path / "killed"), **common)
    last = random.randint(4, 20)  # the first checkpoint is that of step 3
    with run_command(config, project_root) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith(f"step {last} of"):
                break
        process.kill()
    at_death = [step for step, _ in read_log(config.model_dir) if isinstance(step, int)][-1]
    assert 1 <= at_death < 24
    assert run_command(dataclasses.replace(config, resume=True), project_root).wait() == 0
    steps = [step for step, _ in read_log(config.model_dir) if isinstance(step, int)]
    assert steps == list(range(1, 25))
    ends = [build_unet(2), build_unet(2)]
    for folder, model in zip(("whole", "killed"), ends):
        assert Checkpoints(tmp_path / folder, model=model).restore(partial=True) == 24
    for left, right in zip(ends[0].get_weights(), ends[1].get_weights()):
        np.testing.assert_allclose(left, right, rtol=0, atol=1e-6, err_msg=f"killed after step {at_death}")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, for a small disk of its own")
def test_a_full_disk_keeps_the_last_good_checkpoint(tiny: Make, project_root: Path, tmp_path: Path) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    flags = flags_of(tiny(model_dir=str(disk), max_steps=100, checkpoint_every=10))
    script = (
        'mount -t tmpfs -o size=1m tmpfs "$1" || exit 77; disk=$1 kept=$2; shift 2; '
        '"$@"; code=$?; cp -r "$disk/." "$kept"; exit $code'
    )
    line = ["unshare", "-rm", "sh", "-c", script, "sh", str(disk), str(kept), sys.executable]
    done = subprocess.run(
        [*line, str(project_root / "train" / "main.py"), *flags], capture_output=True, text=True, check=False
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a disk of their own")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the disk is full while writing")
    assert done.stderr.count("\n") == 1
    model = build_unet(2)
    step = Checkpoints(kept, model=model).restore(partial=True)
    assert step >= 10
    assert not list((kept / "checkpoints").glob(".*"))


def test_a_run_does_not_overwrite_another(tiny: Make, slices: list[Slice]) -> None:
    run(tiny(), slices)
    with pytest.raises(CheckpointError, match="add --resume"):
        run(tiny(), slices)


def test_only_the_newest_checkpoints_are_kept(tiny: Make, slices: list[Slice]) -> None:
    config = tiny(max_steps=5, checkpoint_every=1)
    run(config, slices)
    folder = Path(config.model_dir) / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "latest.json",
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]


def test_a_checkpoint_of_another_network_is_refused(tiny: Make, slices: list[Slice]) -> None:
    config = tiny()
    run(config, slices)
    with pytest.raises(CheckpointError, match="of another network"):
        Checkpoints(config.model_dir, model=build_unet(4)).restore(partial=True)


def test_a_loss_that_is_not_finite_stops_with_its_step_and_slices(tiny: Make, slices: list[Slice]) -> None:
    poisoned = [dataclasses.replace(slices[0], cost=np.full_like(slices[0].cost, np.inf))]
    with pytest.raises(TrainingError, match=r"the loss of step 1 is (inf|nan) on phantom\[0\]"):
        run(tiny(), poisoned)


def test_mixed_precision_is_what_the_processor_has(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    native = {"bfloat16": "mixed_bfloat16", "float32": "float32"}
    assert precision_of(tiny(use_amp=True)) == native[cpu_amp_dtype()]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert precision_of(tiny(use_amp=True)) == "float32"
    assert "no bfloat16 instructions" in describe_precision(tiny(use_amp=True))
    assert describe_precision(tiny(use_amp=False)) == "float32"
    assert precision_of(tiny(use_amp=True, amp_dtype="bfloat16")) == "mixed_bfloat16"


def test_float16_on_a_cpu_is_refused(tiny: Make) -> None:
    with pytest.raises(ConfigError, match="bfloat16"):
        precision_of(tiny(use_amp=True, amp_dtype="float16"))


def test_schedules(tiny: Make) -> None:
    stairs = Schedule(tiny(learning_rate=1.0, decay_steps=10, decay_rate=0.5))
    assert [float(stairs(tf.constant(step))) for step in (0, 9, 10, 25)] == [1.0, 1.0, 0.5, 0.25]
    cosine = Schedule(tiny(learning_rate=1.0, lr_schedule="cosine", max_steps=10, lr_warmup_steps=2))
    assert [round(float(cosine(tf.constant(step))), 4) for step in (0, 5, 10)] == [0.5, 0.5, 0.0]


def test_weight_decay_shrinks_kernels_and_spares_biases(tiny: Make) -> None:
    kernel, bias = tf.Variable([2.0], name="kernel"), tf.Variable([2.0], name="bias")
    optimizer = make_optimizer(tiny(optimizer="momentum", learning_rate=0.5, weight_decay=0.1), "float32")
    optimizer.apply_gradients([(tf.zeros(1), kernel), (tf.zeros(1), bias)])
    assert float(kernel[0]) == pytest.approx(2 * (1 - 0.5 * 0.1))
    assert float(bias[0]) == 2.0


def test_an_overflow_is_skipped_and_the_loss_scale_recovers(tiny: Make) -> None:
    """The optimizer of a float16 run, on the float16 arithmetic of gradients that overflow."""
    optimizer = make_optimizer(tiny(learning_rate=0.5, optimizer="momentum", weight_decay=0.0), "mixed_float16")
    variable = tf.Variable([1.0])
    optimizer.build([variable])
    scale = float(optimizer.loss_scale)
    overflowing = tf.cast(tf.cast(tf.constant([70000.0]), tf.float16), tf.float32)
    optimizer.apply_gradients([(overflowing, variable)])
    assert float(variable[0]) == 1.0
    assert float(optimizer.loss_scale) == scale / 2
    optimizer.apply_gradients([(tf.constant([1.0]), variable)])
    assert float(variable[0]) == 0.5
    fixed = make_optimizer(tiny(loss_scale=128.0), "mixed_float16")
    assert float(fixed.loss_scale) == 128.0
    assert not fixed.dynamic


def test_sigterm_saves_at_the_step_boundary_and_exits_0(tiny: Make, project_root: Path) -> None:
    config = tiny(max_steps=100_000, log_every=1)
    with run_command(config, project_root) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("step 2 of"):
                os.kill(process.pid, signal.SIGTERM)
                break
        rest = process.stdout.read()
    assert process.returncode == 0
    assert "go on with --resume" in rest
    step = json.loads((Path(config.model_dir) / "checkpoints" / "latest.json").read_text())["step"]
    assert 2 <= step < 100_000


def test_train_predict_and_evaluate_by_the_command(tiny: Make, project_root: Path) -> None:
    config = tiny(exec_mode="train_and_predict", crossvalidation_idx=4)
    line = [sys.executable, str(project_root / "train" / "main.py"), *flags_of(config)]
    subprocess.run(line, check=True)
    written = {path.relative_to(config.model_dir).as_posix() for path in Path(config.model_dir).rglob("*")}
    assert {"config.json", "saved_model/saved_model.pb", "eval/test-probability.tif"} <= written
    record = json.loads((Path(config.model_dir) / "config.json").read_text())
    assert record["held_out"] == {"train-volume.tif": [4]}
    subprocess.run([*line, "--exec_mode", "evaluate"], check=True)
    scores = json.loads((Path(config.model_dir) / "eval" / "scores-96x96.json").read_text())
    assert 0 <= scores["dice"] <= 1
