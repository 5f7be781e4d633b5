"""The training loop: one function from a configuration to a trained model, the same on one rank and on many."""

from __future__ import annotations

import dataclasses
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tqdm import tqdm

from train.checkpoints import CheckpointError, Checkpoints
from train.config import ConfigError, TrainConfig
from train.evaluation import make_predictor
from train.input.dataset import Slice, Windows, windows_of
from train.model.losses import segmentation_loss
from train.model.network import build_unet
from train.model.schedule import Budget, Schedule, record_steps
from unet.errors import UnetError
from unet.machine import cpu_amp_dtype
from unet.scores import dice
from unet.volume.overlay import membrane_overlay

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from train.cluster import Cluster
    from train.evaluation import Predictor
    from train.log import RunLog


# A log gets a line after so many seconds, however few steps these were.
SIGN_OF_LIFE_S = 5.0


class TrainingError(UnetError):
    """A training run that cannot go on."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its model, its last step and whether a signal ended it early."""

    model: tf.keras.Model
    step: int
    interrupted: bool


def precision_of(config: TrainConfig) -> str:
    """The Keras policy that ``--use_amp`` stands for on this machine.

    Raises:
        ConfigError: if float16 is asked for without a GPU.
    """
    if not config.use_amp:
        return "float32"
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    if config.amp_dtype == "float16" and not on_gpu:
        raise ConfigError("--amp_dtype float16 needs a GPU (on a CPU it takes minutes a step): use bfloat16 here")
    if config.amp_dtype == "auto" and not on_gpu:
        return "mixed_bfloat16" if cpu_amp_dtype() == "bfloat16" else "float32"
    if config.amp_dtype == "auto":
        return "mixed_float16"
    return f"mixed_{config.amp_dtype}"


def describe_precision(config: TrainConfig) -> str:
    """The policy in words, with the reason where ``--use_amp`` is not followed."""
    precision = precision_of(config)
    if config.use_amp and precision == "float32":
        return "float32 in spite of --use_amp, which is faster here: this processor has no bfloat16 instructions"
    return precision


def make_optimizer(
    config: TrainConfig, precision: str, schedule: Schedule | None = None
) -> tf.keras.optimizers.Optimizer:
    """The optimizer of the configuration, with loss scaling where the precision is float16."""
    common = {"learning_rate": schedule or Schedule(config), "weight_decay": config.weight_decay or None}
    if config.optimizer == "adam":
        optimizer = tf.keras.optimizers.Adam(**common)
    else:
        optimizer = tf.keras.optimizers.SGD(momentum=config.momentum, **common)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    if precision == "mixed_float16":
        fixed = {"dynamic": False, "initial_scale": config.loss_scale} if config.loss_scale else {}
        optimizer = tf.keras.mixed_precision.LossScaleOptimizer(optimizer, **fixed)
    return optimizer


class Trainer:
    """A model, its optimizer and the step that joins them, on one rank of a cluster."""

    def __init__(self, config: TrainConfig, cluster: Cluster) -> None:
        self.config = config
        self.cluster = cluster
        precision = precision_of(config)
        if config.xla:
            tf.config.optimizer.set_jit("autoclustering")
        self._first_window = tf.Variable(0, trainable=False, dtype=tf.int64)
        self.model = build_unet(
            config.base_filters,
            config.dropout,
            precision=precision,
            seed=config.seed,
            first_window=self._first_window,
        )
        self.schedule = Schedule(config)
        self.optimizer = make_optimizer(config, precision, self.schedule)
        self.optimizer.build(self.model.trainable_variables)
        self.checkpoints = Checkpoints(config.model_dir, model=self.model, optimizer=self.optimizer)
        self._step = tf.function(self._compute_step)

    @property
    def global_batch(self) -> int:
        """Windows per step over all ranks."""
        return self.config.batch_size * self.cluster.size

    def step(self, number: int, batch: tuple[tf.Tensor, ...]) -> tf.Tensor:
        """Run step ``number`` (from 0) on this rank's share of its global batch; its loss on this rank."""
        self._first_window.assign(number * self.global_batch + self.cluster.rank * self.config.batch_size)
        return self._step(*batch)

    def _compute_step(self, images: tf.Tensor, labels: tf.Tensor, costs: tf.Tensor) -> tf.Tensor:
        scales = isinstance(self.optimizer, tf.keras.mixed_precision.LossScaleOptimizer)
        with tf.GradientTape() as plain_tape:
            logits = self.model(images, training=True)
            loss = segmentation_loss(logits, tf.cast(labels, tf.int32), costs, self.config.loss)
            target = self.optimizer.get_scaled_loss(loss) if scales else loss
        tape = self.cluster.average_gradients(plain_tape, fp16_compression=self.config.fp16_compression)
        gradients = tape.gradient(target, self.model.trainable_variables)
        if scales:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(zip(gradients, self.model.trainable_variables))
        return loss

    def synchronise(self) -> None:
        """Give every rank the first rank's model and optimizer."""
        self.cluster.broadcast(self.model.variables)
        self.cluster.broadcast(self.optimizer.variables)


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
    """Remembers a SIGTERM until the step boundary."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> _StopRequest:
        self._former = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._former)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        self.asked = True


def train(
    config: TrainConfig, cluster: Cluster, log: RunLog, slices: Sequence[Slice], held_out: Sequence[Slice]
) -> TrainResult:
    """Train until ``max_steps``, or until a SIGTERM, which saves at the step boundary on all ranks.

    Raises:
        TrainingError: if the loss is not finite; the last checkpoint stays as it was.
        CheckpointError: if ``resume`` finds checkpoints of which none can be used, or there are some without it.
    """
    trainer = Trainer(config, cluster)
    first = _resumed_step(trainer, config, cluster)
    log.rewind(first)
    if not config.resume and cluster.is_first and trainer.checkpoints.exist():
        raise CheckpointError(
            f"{trainer.checkpoints.folder} holds the checkpoints of another run: add --resume to go on from them, "
            "or choose another --model_dir"
        )
    trainer.synchronise()
    windows = windows_of(config, slices)
    offset = first * trainer.global_batch + cluster.rank * config.batch_size
    batches = iter(windows.batches(offset, config.batch_size, trainer.global_batch))
    predict = make_predictor(trainer.model)
    interval = _Interval()
    step, max_steps = first, config.max_steps
    budget = Budget(config, first)
    with (
        _StopRequest() as stop,
        tqdm(total=max_steps, initial=first, unit="step", disable=None if cluster.is_first else True) as bar,
    ):
        while step < max_steps:
            loss, others_stop = _one_step(trainer, windows, batches, step, interval, stopping=stop.asked)
            step += 1
            bar.update()
            rate = interval.img_per_s(trainer.global_batch)
            bar.set_postfix(loss=f"{loss:.4f}", img_per_s=f"{rate:.2f}", refresh=False)
            bar.total = max_steps = _fit(trainer, budget, step, max_steps, log)
            last = step == max_steps or others_stop
            if cluster.is_first and (step % config.log_every == 0 or interval.elapsed_s > SIGN_OF_LIFE_S or last):
                figures = interval.report(trainer.global_batch)
                text = "step {} of {}: loss {loss:.4f}, {img_per_s:.2f} img/s, {input_share:.1%} waiting for input"
                log.event(step, text.format(step, max_steps, **figures), **figures)
                interval = _Interval()
            if config.evaluate_every and held_out and (step % config.evaluate_every == 0 or last):
                score, first_seen = _shared_dice(cluster, predict, held_out)
                log.event(step, f"step {step}: held-out Dice {score:.4f}", dice=score)
                if cluster.is_first:
                    log.picture(step, held_out[0].name, membrane_overlay(held_out[0].image, first_seen))
            if cluster.is_first and (step % config.checkpoint_every == 0 or last):
                trainer.checkpoints.save(step)
            if others_stop:
                break
    return TrainResult(trainer.model, step, interrupted=step < max_steps)


def _fit(trainer: Trainer, budget: Budget, step: int, max_steps: int, log: RunLog) -> int:
    """The steps of the run after ``step`` of them: those that fit into the budget once the first rank knows."""
    if not budget.open:
        return max_steps
    cluster = trainer.cluster
    mine = (budget.fitted(step) or 0) if cluster.is_first else 0
    fitted = int(cluster.sum(tf.constant(mine, tf.int64), name="fitted_steps"))
    if not fitted:
        return max_steps
    budget.open = False
    trainer.schedule.max_steps.assign(float(fitted))
    if cluster.is_first:
        record_steps(trainer.config.model_dir, fitted)
        minutes = (fitted - step) * budget.step_s / 60
        text = f"a step takes {budget.step_s:.2f} s: {fitted} steps in all, {minutes:.1f} minutes more"
        log.event(step, text, max_steps=fitted, step_s=budget.step_s)
    return fitted


def _resumed_step(trainer: Trainer, config: TrainConfig, cluster: Cluster) -> int:
    """Load the newest checkpoint where one is wanted and there; the first rank's step, which counts for all."""
    found = trainer.checkpoints.restore() if config.resume and trainer.checkpoints.exist() else 0
    mine = tf.constant(found if cluster.is_first else 0, tf.int64)
    return int(cluster.sum(mine, name="resumed_step"))


def _shared_dice(
    cluster: Cluster, predict: Predictor, held_out: Sequence[Slice]
) -> tuple[float, npt.NDArray[np.float32]]:
    """The mean Dice of the held-out slices, which the ranks share out, and this rank's first prediction."""
    mine = held_out[cluster.rank :: cluster.size]
    predictions = [predict(item.image) for item in mine]
    total = sum(dice(prediction, item.label) for prediction, item in zip(predictions, mine))
    mean = float(cluster.sum(tf.constant(total, tf.float32), name="held_out_dice")) / len(held_out)
    return mean, predictions[0] if predictions else np.empty(0, np.float32)


def _one_step(
    trainer: Trainer,
    windows: Windows,
    batches: Iterator[tuple[tf.Tensor, ...]],
    step: int,
    interval: _Interval,
    *,
    stopping: bool,
) -> tuple[float, bool]:
    """Run a step; the loss averaged over ranks, and whether any rank was asked to stop."""
    started = time.perf_counter()
    batch = next(batches)
    interval.waited_s += time.perf_counter() - started
    loss = trainer.step(step, batch)
    shared = trainer.cluster.sum(tf.stack([loss, tf.cast(stopping, tf.float32)]), name="step_outcome").numpy()
    mean_loss = float(shared[0]) / trainer.cluster.size
    if not np.isfinite(mean_loss):
        first = step * trainer.global_batch
        names = sorted({windows.slices[windows.slice_index(first + i)].name for i in range(trainer.global_batch)})
        raise TrainingError(
            f"the loss of step {step + 1} is {mean_loss} on {', '.join(names)}: lower --learning_rate or look at these "
            "slices; the last checkpoint is kept"
        )
    interval.loss += mean_loss
    interval.steps += 1
    return mean_loss, bool(shared[1])
