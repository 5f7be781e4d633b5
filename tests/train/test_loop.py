from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf

from train.config import TrainConfig
from train.errors import TrainError
from train.input.split import Data
from train.input.store import Slice
from train.loop import TRIES, TrainingLoop
from train.model.network import build_unet
from train.run.cluster import Cluster
from train.run.folder import Run
from train.run.log import RunLog, read_log
from train.scoring import Tally, tally
from train.trainer import Trainer

Make = Callable[..., TrainConfig]
Fit = Callable[..., list[npt.NDArray[Any]]]
Line = Callable[[TrainConfig], list[str]]


def assert_same(one: Iterable[Any], other: Iterable[Any], atol: float = 1e-7) -> None:
    for left, right in zip(one, other):
        np.testing.assert_allclose(left, right, rtol=0, atol=atol)


def test_training_lowers_the_loss(tiny: Make, fit: Fit, slices: list[Slice]) -> None:
    config = tiny(max_steps=100, log_every=10, batch_size=2, tile_size=220, learning_rate=3e-3, base_filters=4)
    fit(config, slices)
    losses = [data["loss"] for _, data in read_log(config.model_dir) if "loss" in data]
    assert len(losses) >= 6  # on a busy machine a line comes after some seconds too
    assert losses[-1] < 0.8 * losses[0]


def test_resumed_run_equals_uninterrupted_one(tiny: Make, fit: Fit, slices: list[Slice], tmp_path: Path) -> None:
    common = {"max_steps": 6, "checkpoint_every": 3, "augment": True, "lr_schedule": "cosine", "evaluate_every": 2}
    whole = fit(tiny(model_dir=str(tmp_path / "whole"), **common), slices[1:], slices[:1])
    halves = tiny(model_dir=str(tmp_path / "halves"), **common)
    fit(halves, slices[1:], slices[:1])
    newest = tmp_path / "halves" / "checkpoints" / "step-00000006"
    # As a power cut leaves it: the newest checkpoint is damaged, so training resumes from the one before.
    (newest / "state.data-00000-of-00001").write_bytes(b"")
    assert_same(whole, fit(dataclasses.replace(halves, resume=True), slices[1:], slices[:1]))
    best = [Run(tmp_path / name).best().newest for name in ("whole", "halves")]
    assert best[0] is not None
    assert best[1] is not None
    assert best[0][1] == pytest.approx(best[1][1])


def test_resume_begins_where_there_is_nothing_to_continue(tiny: Make, fit: Fit, slices: list[Slice]) -> None:
    # As a job that is always started with --resume, whether for the first time or again.
    plain, resumed = tiny(), tiny(model_dir=tiny().model_dir + "-resumed", resume=True)
    assert_same(fit(plain, slices), fit(resumed, slices))
    for state in Path(resumed.model_dir).glob("checkpoints/step-*/state.data*"):
        state.write_bytes(b"")
    with pytest.raises(TrainError, match="no usable checkpoint"):
        fit(resumed, slices)


def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(tiny: Make, line: Line, tmp_path: Path) -> None:
    common = {
        "max_steps": 24,
        "checkpoint_every": 3,
        "log_every": 1,
        "augment": True,
        "dropout": 0.5,
        "validation_share": 0.2,
        "evaluate_every": 4,
    }
    assert subprocess.run(line(tiny(model_dir=str(tmp_path / "whole"), **common)), check=False).returncode == 0
    config = tiny(model_dir=str(tmp_path / "killed"), **common)
    last = random.randint(4, 20)  # the first checkpoint is that of step 3
    with subprocess.Popen(line(config), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith(f"step {last} of"):
                break
        process.kill()
    at_death = [step for step, _ in read_log(config.model_dir) if isinstance(step, int)][-1]
    assert 1 <= at_death < 24
    # Kills while saving leave what no living process owns; the next that holds the folder removes it.
    for name in ("checkpoints/step-00000099", "best/step-00000099", "saved_model"):
        dying = f"with atomic_directory({str(tmp_path / 'killed' / name)!r}): os.kill(os.getpid(), 9)"
        code = f"import os; from unet.files import atomic_directory\n{dying}"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert len([path for path in (tmp_path / "killed").rglob(".*") if path.is_dir()]) >= 3
    resumed = subprocess.run(line(dataclasses.replace(config, resume=True)), check=False)
    assert resumed.returncode == 0
    hidden = [path.name for path in (tmp_path / "killed").rglob(".*")]
    assert hidden == [".lock"]
    steps = [step for step, data in read_log(config.model_dir) if isinstance(step, int) and "loss" in data]
    assert steps == list(range(1, 25))
    weights: dict[str, list[list[Any]]] = {}
    for name in ("whole", "killed"):
        run, model = Run(tmp_path / name), build_unet(2)
        assert run.checkpoints(model=model).restore(partial=True) == 24
        weights[name] = [model.get_weights()]
        weights[name].append([run.best(model).restore(partial=True), *model.get_weights()])
    for one, other in zip(weights["whole"], weights["killed"]):
        assert_same(one, other, atol=1e-6)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_step_boundary(tiny: Make, line: Line, number: signal.Signals, code: int) -> None:
    config = tiny(max_steps=100_000, log_every=1)
    with subprocess.Popen(line(config), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if text.startswith("step 2 of"):
                os.kill(process.pid, number)
                break
        rest = process.stdout.read()
    assert process.returncode == code
    assert "continue with --resume" in rest
    step = json.loads((Path(config.model_dir) / "checkpoints" / "latest.json").read_text())["step"]
    assert 2 <= step < 100_000


def test_training_goes_on_when_nobody_reads_what_it_says(tiny: Make, line: Line) -> None:
    config = tiny(max_steps=6, log_every=1)
    with subprocess.Popen(line(config), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert (Path(config.model_dir) / "checkpoints" / "step-00000006").is_dir()
    assert (Path(config.model_dir) / "saved_model" / "saved_model.pb").exists()


def test_a_loss_that_is_not_finite_names_its_step_its_slices_and_the_last_good_checkpoint(
    tiny: Make, fit: Fit, slices: list[Slice]
) -> None:
    infinite = dataclasses.replace(slices[0], border=np.full(slices[0].label.shape, np.inf, np.float16))
    with pytest.raises(TrainError, match=r"of step 1 is not finite on phantom\[0\].*there is no checkpoint yet"):
        fit(tiny(), [infinite])
    fit(tiny(), slices)
    with pytest.raises(TrainError, match=r"of step 5 is not finite .*the last good checkpoint is .*step-00000004"):
        fit(tiny(max_steps=8, resume=True), [infinite])


@pytest.mark.parametrize("poisoned", [1, 2, 3])
def test_a_step_without_a_finite_gradient_is_computed_again(
    poisoned: int, tiny: Make, fit: Fit, slices: list[Slice], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As often as a step may be tried it is an accident, of which nothing is left; once more and it is not."""
    config = tiny(
        model_dir=str(tmp_path / "disturbed"), max_steps=6, optimizer="adam", lr_schedule="cosine", log_every=1
    )
    whole = fit(dataclasses.replace(config, model_dir=str(tmp_path / "whole")), slices)
    left = {4: poisoned}

    class Poisoned(Trainer):
        def step(self, number: int, batch: tuple[tf.Tensor, ...]) -> tf.Tensor:
            images, labels, costs = batch
            left[number] = left.get(number, 0) - 1
            return super().step(number, (images, labels, costs * np.nan if left[number] >= 0 else costs))

    run, trainer = Run(config.model_dir), Poisoned(config, Cluster())
    with contextlib.closing(RunLog(config.model_dir, active=True)) as log, run.locked():
        loop = TrainingLoop(trainer, run, log, Data(slices, []), 0)
        if poisoned == TRIES:
            with pytest.raises(TrainError, match=r"of step 5 is not finite on phantom\[\d\]: lower --learning_rate"):
                loop.run()
        else:
            assert loop.run().step == 6
            assert_same(whole, trainer.model.get_weights(), atol=0)
    assert capsys.readouterr().out.count("of step 5 is not finite on phantom[") == min(poisoned, TRIES - 1)
    assert all(np.isfinite(data["loss"]) for _, data in read_log(config.model_dir) if "loss" in data)


@pytest.mark.parametrize("rate", [1e12, 1e4])
def test_diverged_weights_are_never_saved(tiny: Make, fit: Fit, slices: list[Slice], rate: float) -> None:
    """ReLU of NaN is 0, so the loss stays finite: the weights themselves are looked at."""
    fit(tiny(), slices)
    diverging = tiny(max_steps=12, checkpoint_every=1, resume=True, learning_rate=rate)
    with pytest.raises(TrainError, match=r"(diverged by step|gradient of step).*last good checkpoint is .*step-0"):
        fit(diverging, slices)
    run, model = Run(diverging.model_dir), build_unet(2)
    run.checkpoints(model=model).restore(partial=True)
    assert all(np.isfinite(array).all() and np.abs(array).max() < 65504 for array in model.get_weights())


def test_the_best_weights_are_kept_and_not_the_last(tiny: Make, fit: Fit, slices: list[Slice]) -> None:
    config = tiny(max_steps=8, evaluate_every=1, learning_rate=0.003, checkpoint_every=100)
    fit(config, slices[1:], slices[:1])
    scores = {
        step: data["score"] for step, data in read_log(config.model_dir) if isinstance(step, int) and "v_rand" in data
    }
    assert sorted(scores) == list(range(1, 9))
    newest = Run(config.model_dir).best().newest
    assert newest is not None
    facts = newest[1]
    assert facts["step"] == min(step for step in scores if scores[step] == max(scores.values()))
    assert facts["score"] == max(scores.values())
    # A run never resumes from before its best weights.
    saved = [path.name for path in (Path(config.model_dir) / "checkpoints").glob("step-*")]
    assert f"step-{facts['step']:08d}" in saved


@pytest.mark.parametrize(("patience", "compared"), [(0, range(8, 11)), (100, range(1, 11))])
def test_under_a_cosine_the_weights_that_have_settled_are_compared(
    patience: int, compared: range, tiny: Make, fit: Fit, slices: list[Slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where each validation finds worse weights than the one before."""
    falling = iter(range(10, 0, -1))
    monkeypatch.setattr(Tally, "highest", property(lambda self: float(next(falling))))
    config = tiny(max_steps=10, evaluate_every=1, lr_schedule="cosine", patience=patience, validation_share=0.2)
    fit(config, slices[1:], slices[:1])
    newest = Run(config.model_dir).best().newest
    assert newest is not None
    assert newest[1]["step"] == compared[0]


def test_a_run_ends_when_it_has_waited_long_enough_for_better_weights(
    tiny: Make, fit: Fit, slices: list[Slice]
) -> None:
    """At no learning rate the first validation is the best, and the third after it is one too many."""
    config = tiny(max_steps=100, evaluate_every=2, patience=3, learning_rate=0.0, validation_share=0.2)
    first = fit(config, slices[1:], slices[:1])
    steps = [step for step, data in read_log(config.model_dir) if isinstance(step, int) and "v_rand" in data]
    assert steps == [2, 4, 6, 8]
    run = Run(config.model_dir)
    newest = run.best().newest
    assert newest is not None
    assert newest[1]["step"] == 2
    assert run.checkpoints().names()[0] == "step-00000008"
    # Resumed, it has waited already.
    assert_same(first, fit(dataclasses.replace(config, resume=True), slices[1:], slices[:1]))
    assert [step for step, data in read_log(config.model_dir) if isinstance(step, int) and "v_rand" in data] == steps
    with pytest.raises(TrainError, match="give it a --validation_share"):
        tiny(patience=1)


def test_of_a_large_validation_part_the_sample_is_scored(
    tiny: Make, fit: Any, slices: list[Slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noting(predict: Any, items: Any) -> Any:
        items = list(items)
        seen.extend(item.name for item in items)
        return tally(predict, items)

    monkeypatch.setattr("train.scoring._VALIDATED_PX", 2 * 96 * 96)
    monkeypatch.setattr("train.loop.tally", noting)
    fit(tiny(max_steps=1, validation_share=0.2), slices[:1], slices[1:])
    assert seen == ["phantom[2]", "phantom[4]"]
