"""How many steps a run takes, and its learning rate at each of them."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

if TYPE_CHECKING:
    from train.config import TrainConfig

# The first steps trace and compile the network; the next ones are timed. A slow machine is timed for a shorter count.
UNTIMED_STEPS = 3
TIMED_STEPS = 20
TIMED_S = 5.0
# A run that will end by this share of its time too late or too early has its steps fitted once more. How long a step
# takes now is the mean of the latest ones, so many and over this share of the time: of a few, one pause would change
# everything.
TOLERATED = 0.1
_LATEST, _LATEST_SHARE = 10, 0.05


class Schedule(tf.keras.optimizers.schedules.LearningRateSchedule):
    """The learning rate at a step: a linear rise, then constant, decaying by stairs, or half a cosine to zero.

    Attributes:
        max_steps: float32 scalar, the steps of the run; the cosine reaches zero there. A run may change it.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.max_steps = tf.Variable(float(config.max_steps), trainable=False, dtype=tf.float32)

    def __call__(self, step: tf.Tensor) -> tf.Tensor:
        """The learning rate of the step after ``step`` finished ones."""
        config = self.config
        done = tf.cast(step, tf.float32)
        rate = tf.constant(config.learning_rate)
        if config.lr_schedule == "exponential":
            rate *= config.decay_rate ** tf.floor(done / config.decay_steps)
        elif config.lr_schedule == "cosine":
            rate *= 0.5 * (1 + tf.cos(np.pi * tf.minimum(done / self.max_steps, 1.0)))
        if config.lr_warmup_steps > 0:
            rate *= tf.minimum((done + 1) / config.lr_warmup_steps, 1.0)
        return rate

    def get_config(self) -> dict[str, Any]:
        """The settings, for Keras."""
        return {"config": dataclasses.asdict(self.config)}


class Budget:
    """Fits the number of steps to ``--max_minutes`` by the time that the first steps take.

    Args:
        config: ``max_minutes`` is the budget from now on, 0 for none; ``max_steps`` stays the upper limit.
        first: steps that a former run did already.

    Attributes:
        open: whether the number of steps is still to be fitted.
        step_s: seconds that a step took, once fitted.
    """

    def __init__(self, config: TrainConfig, first: int) -> None:
        self.open = config.max_minutes > 0
        self._limit = config.max_steps
        self._ends = time.perf_counter() + config.max_minutes * 60
        self._from = first + UNTIMED_STEPS
        self._since = 0.0
        self.step_s = 0.0
        self._tolerated_s = config.max_minutes * 60 * TOLERATED
        self._latest: deque[float] = deque()
        self._latest_s = config.max_minutes * 60 * _LATEST_SHARE

    def fitted(self, done: int) -> int | None:
        """The steps of the whole run, once enough of them are timed; None before.

        Args:
            done: steps done so far; to be asked after each of them.
        """
        now = time.perf_counter()
        if done == self._from:
            self._since = now
        timed = done - self._from
        if timed < 1 or (timed < TIMED_STEPS and now - self._since < TIMED_S):
            return None
        self.step_s = (now - self._since) / timed
        left = max(0, int((self._ends - now) / self.step_s))
        return max(done, min(self._limit, done + left))

    def took(self, seconds: float) -> None:
        """Note how long a step took, validations and checkpoints left out. The first ones compile, and say nothing."""
        if self.open:
            return
        self._latest.append(seconds)
        while len(self._latest) > _LATEST and sum(self._latest) - self._latest[0] >= self._latest_s:
            self._latest.popleft()

    def fitted_again(self, done: int, planned: int, aside_s: float = 0.0) -> int | None:
        """The steps of the whole run, where the machine has become so slow or so fast that they must change; else None.

        Args:
            done: steps done so far.
            planned: steps of the whole run.
            aside_s: what the validations that are left will take.
        """
        now = time.perf_counter()
        if len(self._latest) < _LATEST or sum(self._latest) < self._latest_s:
            return None
        step_s = sum(self._latest) / len(self._latest)
        left_s = self._ends - now - aside_s
        fits = min(self._limit, done + max(0, int(left_s / step_s)))
        late_s = (planned - done) * step_s - left_s
        early_s = (fits - planned) * step_s
        if max(late_s, early_s) <= self._tolerated_s:
            return None
        self.step_s = step_s
        self._latest.clear()
        return fits
