"""The number of steps that fits into a budget of time, and the learning rate and the validations that follow it."""

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
from train.input.store import Slice
from train.model.schedule import TIMED_STEPS, UNTIMED_STEPS, Budget, Schedule
from train.run.folder import Run
from train.run.log import read_log

Make = Callable[..., TrainConfig]


def test_the_cosine_ends_where_the_run_ends(tiny: Make) -> None:
    schedule = Schedule(tiny(learning_rate=1.0, lr_schedule="cosine", max_steps=1000))
    rate = tf.function(schedule)
    assert float(rate(tf.constant(10))) > 0.99
    schedule.max_steps.assign(20)
    assert [round(float(rate(tf.constant(step))), 4) for step in (10, 20, 30)] == [0.5, 0.0, 0.0]


def test_the_exponential_rate_falls_by_stairs(tiny: Make) -> None:
    rate = Schedule(tiny(learning_rate=1.0, lr_schedule="exponential", decay_rate=0.5, decay_steps=2))
    assert [float(rate(tf.constant(done))) for done in range(6)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_the_rate_rises_over_the_first_steps_and_is_never_0(tiny: Make) -> None:
    rate = Schedule(tiny(learning_rate=1.0, lr_schedule="cosine", max_steps=10**6, lr_warmup_steps=4))
    assert [float(rate(tf.constant(done))) for done in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


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


def test_a_machine_that_becomes_slower_takes_fewer_steps_and_gets_them_back(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("train.model.schedule.time.perf_counter", lambda: clock[0])
    budget, planned = Budget(tiny(max_steps=100_000, max_minutes=2.0), 0), 0

    def steps(count: int, seconds: float, done: int) -> int:
        nonlocal planned
        for _ in range(count):
            clock[0] += seconds
            done += 1
            budget.took(seconds)
            if budget.open and (fitted := budget.fitted(done)):
                planned, budget.open = fitted, False
            elif again := budget.fitted_again(done, planned):
                planned = again
        return done

    done = steps(30, 0.5, 0)
    assert planned == 240
    # A tenth more is no reason: steps of 0.53 s would end after 126.3 s.
    done = steps(20, 0.53, done)
    assert planned == 240
    done = steps(20, 2.0, done)
    assert clock[0] + (planned - done) * 2.0 <= 120 * 1.1
    # A machine that recovers gets back what fits into the time that is left.
    before = planned
    done = steps(20, 0.5, done)
    assert planned > before + 20
    assert clock[0] + (planned - done) * 0.5 == pytest.approx(120, rel=0.1)
    # One that stood still beyond the end takes no more steps than tell how long one takes.
    clock[0] = 500.0
    before = done
    while done < planned:
        done = steps(1, 0.5, done)
    assert done <= before + 12


def test_a_step_time_that_jitters_changes_nothing(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, planned = [0.0], 1800
    monkeypatch.setattr("train.model.schedule.time.perf_counter", lambda: clock[0])
    budget = Budget(tiny(max_steps=100_000, max_minutes=3.0), 0)
    budget.open = False
    for done in range(1, 1700):
        seconds = 0.05 if done // 20 % 2 else 0.15
        clock[0] += seconds
        budget.took(seconds)
        assert budget.fitted_again(done, planned) is None


def test_a_budget_is_open_until_enough_steps_are_timed(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("train.model.schedule.time.perf_counter", lambda: clock[0])
    assert not Budget(tiny(max_minutes=0.0), 0).open
    budget = Budget(tiny(max_steps=1000, max_minutes=1.0), 7)
    assert (budget.open, budget.step_s) == (True, 0.0)
    # One slow step is enough, and takes the time that is left: 43 s of 60 for steps of 6 s.
    for done, seconds, fitted in ((8, 1.0, None), (9, 4.0, None), (10, 6.0, None), (11, 6.0, 11 + 7)):
        clock[0] += seconds
        assert budget.fitted(done) == fitted
    assert budget.step_s == 6.0
    # As long as it is open nothing is taken away, and the first steps say nothing of later ones.
    for _ in range(20):
        budget.took(1000.0)
    assert budget.fitted_again(11, 18) is None
    budget.open = False
    assert budget.fitted_again(11, 18) is None
    for _ in range(10):
        budget.took(1000.0)
    assert budget.fitted_again(11, 18) == 11
    assert budget.step_s == 1000.0
    clock[0] = 1000.0
    assert budget.fitted(12) == 12


def test_a_tenth_more_than_the_budget_is_tolerated_and_no_more(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.model.schedule.time.perf_counter", lambda: 0.0)

    def again(done: int, planned: int, aside_s: float = 0.0, steps: int = 10) -> int | None:
        budget = Budget(tiny(max_steps=1000, max_minutes=1.0), 0)
        budget.open = False
        for _ in range(steps):
            budget.took(1.0)
        return budget.fitted_again(done, planned, aside_s)

    assert again(0, 1000, steps=9) is None
    assert [again(*steps) for steps in ((0, 66), (0, 67), (5, 72))] == [None, 60, 65]
    # So is a tenth less.
    assert [again(*steps) for steps in ((0, 54), (0, 53), (5, 58))] == [None, 60, 65]
    # The validations that are left take their part.
    assert [again(0, planned, aside_s=9.0) for planned in (57, 58)] == [None, 51]
    # What the run was limited to stays its limit.
    assert [again(*steps) for steps in ((960, 995), (950, 970))] == [None, 1000]


def test_a_run_on_a_machine_that_becomes_slower_ends_in_order(
    tiny: Make, fit: Callable[..., object], slices: list[Slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "fitted", lambda self, done: 40 if done == 4 else None)
    monkeypatch.setattr(Budget, "fitted_again", lambda self, done, *_: 9 if done == 6 else None)
    config = tiny(max_steps=1_000_000, max_minutes=60.0, lr_schedule="cosine")
    fit(config, slices)
    steps = [step for step, data in read_log(config.model_dir) if isinstance(step, int) and "loss" in data]
    assert steps[-1] == 9
    record = json.loads(Path(config.model_dir, "config.json").read_text())
    assert (record["settings"]["max_steps"], record["fitted"]) == (9, True)
    assert (Path(config.model_dir) / "checkpoints" / "step-00000009").is_dir()


def test_a_run_that_was_fitted_to_a_time_validates_as_often_as_another(
    tiny: Make, fit: Callable[..., object], slices: list[Slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Budget, "fitted", lambda self, done: 210 if done == 4 else None)
    monkeypatch.setattr(Budget, "fitted_again", lambda self, done, *_: None)
    config = tiny(max_steps=1_000_000_000, max_minutes=60.0, validation_share=0.2)
    fit(config, slices[1:], slices[:1])
    assert [step for step, data in read_log(config.model_dir) if "threshold" in data] == [100, 200, 210]


def test_the_validations_that_are_left_are_counted_once_one_was_timed(
    tiny: Make, fit: Callable[..., object], slices: list[Slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    monkeypatch.setattr(Budget, "fitted", lambda self, done: None)
    monkeypatch.setattr(Budget, "fitted_again", lambda self, done, planned, aside_s: left.append(aside_s > 0))
    fit(tiny(max_steps=6, max_minutes=60.0, evaluate_every=2, validation_share=0.2), slices[1:], slices[:1])
    assert left == [False, False, True, True, True, False]


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
