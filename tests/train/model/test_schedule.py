"""The number of steps that fits into a budget of time, and the learning rate that follows it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

from train.config import TrainConfig
from train.errors import TrainError
from train.model.schedule import TIMED_STEPS, UNTIMED_STEPS, Budget, Schedule
from train.run.folder import Run

Make = Callable[..., TrainConfig]


def test_the_cosine_ends_where_the_run_ends(tiny: Make) -> None:
    schedule = Schedule(tiny(learning_rate=1.0, lr_schedule="cosine", max_steps=1000))
    rate = tf.function(schedule)
    assert float(rate(tf.constant(10))) > 0.99
    schedule.max_steps.assign(20)
    assert [round(float(rate(tf.constant(step))), 4) for step in (10, 20)] == [0.5, 0.0]


@pytest.mark.parametrize("first", [0, 500])
def test_the_steps_fill_the_budget(tiny: Make, first: int) -> None:
    budget = Budget(tiny(max_steps=100_000, max_minutes=0.5), first)
    started = time.perf_counter()
    for done in range(first + 1, first + UNTIMED_STEPS + TIMED_STEPS + 1):
        time.sleep(0.002)
        fitted = budget.fitted(done)
        assert (fitted is None) == (done < first + UNTIMED_STEPS + TIMED_STEPS)
    assert fitted is not None
    left_s = 30 - (time.perf_counter() - started)
    assert (fitted - done) * budget.step_s == pytest.approx(left_s, abs=0.5)


def test_the_limit_stays_a_limit(tiny: Make) -> None:
    budget = Budget(tiny(max_steps=30, max_minutes=60.0), 0)
    assert [budget.fitted(done) for done in range(1, 24)][-1] == 30


def test_a_run_takes_the_steps_that_fit_and_its_resumption_too(tiny: Make, line: Callable[..., list[str]]) -> None:
    config = tiny(max_steps=1_000_000, max_minutes=0.05, lr_schedule="cosine")
    done = subprocess.run(line(config), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    record = json.loads(Path(config.model_dir, "config.json").read_text())
    steps = record["settings"]["max_steps"]
    assert 0 < steps < 1_000_000
    assert f"{steps} steps in all" in said
    assert f"trained {steps} steps" in said
    # A second budget must not be spent on a run whose learning rate was laid out for the first.
    resumed = Run(config.model_dir).configure({**dataclasses.asdict(config), "resume": True})
    assert (resumed.max_steps, resumed.max_minutes) == (steps, 0)


def test_a_negative_budget_is_refused(tiny: Make) -> None:
    with pytest.raises(TrainError, match="--max_minutes is -1"):
        tiny(max_minutes=-1.0)
