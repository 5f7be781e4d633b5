"""The training loop: the same on one rank and on many, and the same whether or not it was interrupted."""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tqdm import tqdm

from train.errors import TrainError
from train.evaluation import make_predictor
from train.input.dataset import windows_of
from train.model.schedule import Budget
from train.run.folder import kept, require_sound
from train.run.progress import watched
from train.scoring import Tally, sample, tally
from unet.errors import stopping_signals
from unet.volume.overlay import membrane_overlay

if TYPE_CHECKING:
    from train.input.split import Data
    from train.run.folder import Run
    from train.run.log import RunLog
    from train.trainer import Trainer

# A log gets a line after so many seconds, however few steps these were.
SIGN_OF_LIFE_S = 5.0
# How often a step is computed whose gradient is not finite. On processors with AMX, oneDNN's gradient of some kernels
# reads memory that nobody wrote, times 0: that is no number where a NaN was left there, and right the next time.
TRIES = 3
# Under a cosine the weights of this last share of a run are compared, where the rate is below a tenth. Before, they
# move so far from one validation to the next that the luckiest would win on a few slices.
COMPARED = 0.2


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: its last step, and the signal that stopped it before the end, 0 for none."""

    step: int
    stopped_by: int


@dataclass
class _Interval:
    """What happened since the last line of the log."""

    loss: float = 0.0
    steps: int = 0
    waited_s: float = 0.0
    started: float = dataclasses.field(default_factory=time.perf_counter)

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def img_per_s(self, global_batch: int) -> float:
        return self.steps * global_batch / self.elapsed_s

    def report(self, global_batch: int) -> dict[str, float]:
        return {
            "loss": self.loss / self.steps,
            "img_per_s": self.img_per_s(global_batch),
            "input_share": self.waited_s / self.elapsed_s,
        }


class _StopRequest:
    """Remembers until the step boundary that the run is to stop; a second Ctrl-C does not wait.

    A closed terminal counts as a SIGTERM.
    """

    def __init__(self) -> None:
        self.asked = 0

    def __enter__(self) -> _StopRequest:
        self._former = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, *stopping_signals())}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.asked == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM


class TrainingLoop:
    """Trains until the last step, or until a signal, which saves at the step boundary on all ranks.

    Args:
        trainer: holds the weights to begin with.
        run: the folder, which this process holds locked.
        log: takes the lines.
        data: the slices.
        first: steps that the weights were trained already.
    """

    def __init__(self, trainer: Trainer, run: Run, log: RunLog, data: Data, first: int) -> None:
        self.trainer, self.cluster, self.config = trainer, trainer.cluster, trainer.config
        self.run_folder, self.log = run, log
        self.step, self.max_steps = first, self.config.max_steps
        self._checkpoints = run.checkpoints(model=trainer.model, optimizer=trainer.optimizer)
        self._best = run.best(trainer.model)
        newest = self._best.newest
        self._best_score = float(newest[1]["score"]) if newest else -math.inf
        self._best_step = int(newest[1]["step"]) if newest else 0
        self._windows = windows_of(self.config, data.training)
        self._validation = sample(data.validation)
        offset = first * trainer.global_batch + self.cluster.rank * self.config.batch_size
        self._batches = iter(
            self._windows.batches(
                offset, self.config.batch_size, trainer.global_batch, threads=self.cluster.input_threads
            )
        )
        self._predict = make_predictor(trainer.model)
        self._interval = _Interval()
        self._budget = Budget(self.config, first)
        self._fitted_again = 0
        self._validation_s = 0.0

    def run(self) -> TrainResult:
        """Train.

        Raises:
            TrainError: if the loss or a weight is no number; the last good checkpoint stays as it was.
        """
        silent = None if self.cluster.is_first else True
        stopped_by = 0
        with (
            _StopRequest() as stop,
            tqdm(total=self.max_steps, initial=self.step, unit="step", disable=silent) as bar,
        ):
            while self.step < self.max_steps and not stopped_by and not self._out_of_patience:
                loss, stopped_by = self._one_step(stop.asked)
                self.step += 1
                bar.update()
                rate = self._interval.img_per_s(self.trainer.global_batch)
                bar.set_postfix(loss=f"{loss:.4f}", img_per_s=f"{rate:.2f}", refresh=False)
                self._fit()
                bar.total = self.max_steps
                self._after_step(last=self.step == self.max_steps or bool(stopped_by))
        ended = self.step == self.max_steps or self._out_of_patience
        return TrainResult(self.step, 0 if ended else stopped_by)

    @property
    def _between(self) -> int:
        return self.config.steps_between_validations(self.max_steps)

    @property
    def _out_of_patience(self) -> bool:
        """Whether as many validations as are waited for brought no better weights; of a resumed run, too."""
        between = self._between
        return 0 < self.config.patience <= self.step // between - self._best_step // between

    @property
    def _compares(self) -> bool:
        """Whether the weights of this step may become the best ones."""
        settles = self.config.lr_schedule == "cosine" and self.config.patience == 0
        return not settles or self.step >= (1 - COMPARED) * self.max_steps

    def _after_step(self, *, last: bool) -> None:
        """Log, validate and save, where it is time to."""
        late = self._interval.elapsed_s > SIGN_OF_LIFE_S
        if self.cluster.is_first and (self.step % self.config.log_every == 0 or late or last):
            figures = self._interval.report(self.trainer.global_batch)
            text = "step {} of {}: loss {loss:.4f}, {img_per_s:.2f} img/s, {input_share:.1%} waiting for input"
            self.log.event(self.step, text.format(self.step, self.max_steps, **figures), **figures)
            self._interval = _Interval()
        ended = self.step == self.max_steps
        validates = bool(self._validation) and (ended or self.step % self._between == 0)
        saves = last or self.step % self.config.checkpoint_every == 0
        started = time.perf_counter()
        if validates or saves:
            # On every rank: all hold the same weights, so all stop together.
            require_sound(self.trainer.variables, self.step, self._checkpoints)
        improved = self._validate() if validates else False
        self._validation_s = time.perf_counter() - started if validates else self._validation_s
        # A run that is resumed never starts before its best weights.
        if self.cluster.is_first and (saves or improved or self._out_of_patience):
            self._checkpoints.save(self.step)
        # The next line of the log is about training alone.
        self._interval.started += time.perf_counter() - started

    def _one_step(self, asked: int) -> tuple[float, int]:
        """Run a step; the loss averaged over ranks, and the signal that any rank was sent, 0 for none."""
        started = time.perf_counter()
        batch = next(self._batches)
        self._interval.waited_s += time.perf_counter() - started
        signals = [float(asked == signal.SIGTERM), float(asked == signal.SIGINT)]
        timed = self.cluster.is_first and self.config.max_minutes > 0
        aside_s = self._validation_s * ((self.max_steps - self.step) // self._between)
        again = float(self._budget.fitted_again(self.step, self.max_steps, aside_s) or 0) if timed else 0.0
        for tries in range(1, TRIES + 1):
            loss = self.trainer.step(self.step, batch)
            shared = self.cluster.sum(tf.stack([loss, *signals, again]), name="step_outcome").numpy()
            if np.isfinite(shared[0]):
                break
            self._say_unsound(tries)
        self._fitted_again = int(shared[3])
        self._budget.took(time.perf_counter() - started)
        mean_loss = float(shared[0]) / self.cluster.size
        self._interval.loss += mean_loss
        self._interval.steps += 1
        return mean_loss, signal.SIGINT if shared[2] else signal.SIGTERM if shared[1] else 0

    def _say_unsound(self, tries: int) -> None:
        """Say that a step gave no finite gradient and is computed again.

        Raises:
            TrainError: it has been tried often enough.
        """
        first, size = self.step * self.trainer.global_batch, self.trainer.global_batch
        indices = {self._windows.slice_index(first + number) for number in range(size)}
        names = ", ".join(sorted(self._windows.slices[index].name for index in indices))
        what = f"the loss or gradient of step {self.step + 1} is not finite on {names}"
        if tries == TRIES:
            raise TrainError(f"{what}: lower --learning_rate or look at these slices; {kept(self._checkpoints)}")
        self.log.event(self.step + 1, f"{what}: it is computed again", computed_again=tries)

    def _fit(self) -> None:
        """Fit the number of steps to the minutes.

        The first rank knows how long a step takes after the first ones, and later whether the machine became slower or
        faster.
        """
        fitted = max(self.step, self._fitted_again) if self._fitted_again else 0
        if self._budget.open:
            mine = (self._budget.fitted(self.step) or 0) if self.cluster.is_first else 0
            fitted = int(self.cluster.sum(tf.constant(mine, tf.int64), name="fitted_steps"))
        if not fitted:
            return
        self._budget.open = False
        self.max_steps = fitted
        self.trainer.schedule.max_steps.assign(float(fitted))
        if self.cluster.is_first:
            self.run_folder.set_steps(fitted)
            minutes = (fitted - self.step) * self._budget.step_s / 60
            text = f"a step takes {self._budget.step_s:.2f} s: {fitted} steps in all, {minutes:.1f} minutes more"
            self.log.event(self.step, text, max_steps=fitted, step_s=self._budget.step_s)

    def _validate(self) -> bool:
        """Score the validation part, which the ranks share out; whether these are the best weights so far."""
        shown: list[npt.NDArray[Any]] = []

        def predict(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
            probability = self._predict(image)
            shown[:] = shown or [membrane_overlay(image, probability)]
            return probability

        mine = self._validation[self.cluster.rank :: self.cluster.size]
        found = tally(predict, watched(mine, "validation slices scored", passing=True))
        sums = self.cluster.sum(tf.constant(found.sums), name="validation")
        total = Tally(np.asarray(sums))
        threshold = total.best_threshold
        scores = total.at(threshold)
        score = total.highest
        improved = self._compares and score > self._best_score
        text = "validation V_rand {v_rand:.4f}, V_info {v_info:.4f}, Dice {dice:.4f} at the threshold"
        ending = ", the best so far" if improved else ""
        facts = {"score": score, "threshold": threshold, **scores}
        self.log.event(self.step, f"step {self.step}: {text.format(**scores)} {threshold}{ending}", **facts)
        if improved:
            self._best_score, self._best_step = score, self.step
            if self.cluster.is_first:
                self._best.save(self.step, **facts)
        if self.cluster.is_first and shown:
            self.log.picture(self.step, self._validation[0].name, shown[0])
        return improved
