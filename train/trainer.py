"""A model, its optimizer and the step that joins them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import tensorflow as tf

from train.errors import TrainError
from train.model.losses import segmentation_loss
from train.model.network import DECODER, build_unet
from train.model.schedule import Schedule
from unet.machine import cpu_amp_dtype

if TYPE_CHECKING:
    from train.config import TrainConfig
    from train.run.cluster import Cluster


def precision_of(config: TrainConfig) -> str:
    """The Keras policy that ``--use_amp`` stands for on this machine.

    Raises:
        TrainError: if float16 is asked for without a GPU.
    """
    if not config.use_amp:
        return "float32"
    on_gpu = bool(tf.config.list_physical_devices("GPU"))
    if config.amp_dtype == "float16" and not on_gpu:
        raise TrainError("--amp_dtype float16 needs a GPU (on a CPU it takes minutes a step): use bfloat16 here")
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
    common = {
        "learning_rate": schedule or Schedule(config),
        "weight_decay": config.weight_decay or None,
        "global_clipnorm": config.clip_norm or None,
    }
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
        self.trained = [item for item in self.model.trainable_variables if self._is_trained(item)]
        self.optimizer.build(self.trained)
        self._step = tf.function(self._compute_step)

    @property
    def global_batch(self) -> int:
        """Windows per step over all ranks."""
        return self.config.batch_size * self.cluster.size

    def _is_trained(self, variable: tf.Variable) -> bool:
        return self.config.train_part == "everything" or variable.name.startswith(DECODER)

    @property
    def variables(self) -> list[tf.Variable]:
        """The weights and everything that the optimizer keeps."""
        return [*self.model.variables, *state_of(self.optimizer)]

    def step(self, number: int, batch: tuple[tf.Tensor, ...]) -> tf.Tensor:
        """Run step ``number`` (from 0) on this rank's share of its global batch; its loss on this rank.

        Where the gradient is not finite, nothing changes and the loss is NaN. (In float16 Keras' loss scaling leaves
        the weights alone, and takes an infinite gradient for a sign that its scale is too large.)
        """
        self._first_window.assign(number * self.global_batch + self.cluster.rank * self.config.batch_size)
        return self._step(*batch)

    def _compute_step(self, images: tf.Tensor, labels: tf.Tensor, costs: tf.Tensor) -> tf.Tensor:
        scales = isinstance(self.optimizer, tf.keras.mixed_precision.LossScaleOptimizer)
        with tf.GradientTape() as plain_tape:
            logits = self.model(images, training=True)
            loss = segmentation_loss(logits, tf.cast(labels, tf.int32), costs, self.config.loss)
            target = self.optimizer.get_scaled_loss(loss) if scales else loss
        tape = self.cluster.average_gradients(plain_tape, fp16_compression=self.config.fp16_compression)
        gradients = tape.gradient(target, self.trained)
        if scales:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
            self.optimizer.apply_gradients(zip(gradients, self.trained))
            return loss
        # The gradients are of all ranks, so all decide alike.
        sound = tf.math.is_finite(tf.linalg.global_norm(gradients))
        tf.cond(sound, lambda: self._apply(gradients), self.optimizer.iterations.read_value)
        return tf.where(sound, loss, np.float32(np.nan))

    def _apply(self, gradients: list[tf.Tensor]) -> tf.Tensor:
        self.optimizer.apply_gradients(zip(gradients, self.trained))
        return self.optimizer.iterations.read_value()

    def synchronise(self) -> None:
        """Give every rank the first rank's model and optimizer."""
        self.cluster.broadcast(self.variables)


def state_of(optimizer: tf.keras.optimizers.Optimizer) -> list[tf.Variable]:
    """Everything that an optimizer keeps; its ``variables`` leave out an adaptive loss scale and its counter."""
    kept = list(optimizer.variables)
    if isinstance(optimizer, tf.keras.mixed_precision.LossScaleOptimizer) and optimizer.dynamic:
        # Keras gives the scale itself only as a tensor.
        kept += [optimizer._loss_scale.current_loss_scale, optimizer._loss_scale.counter]
    return kept
