from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from train.config import TrainConfig
from train.errors import TrainError
from train.input.dataset import windows_of
from train.input.store import Slice
from train.model.schedule import Schedule
from train.run.cluster import Cluster
from train.trainer import Trainer, describe_precision, make_optimizer, precision_of, state_of
from unet.machine import cpu_amp_dtype

Make = Callable[..., TrainConfig]


def test_mixed_precision_is_what_the_processor_has(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    native = {"bfloat16": "mixed_bfloat16", "float32": "float32"}
    assert precision_of(tiny(use_amp=True)) == native[cpu_amp_dtype()]
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert precision_of(tiny(use_amp=True)) == "float32"
    assert "no bfloat16 instructions" in describe_precision(tiny(use_amp=True))
    assert describe_precision(tiny(use_amp=False)) == "float32"
    assert precision_of(tiny(use_amp=True, amp_dtype="bfloat16")) == "mixed_bfloat16"


def test_float16_on_a_cpu_is_refused(tiny: Make) -> None:
    with pytest.raises(TrainError, match="bfloat16"):
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


def test_a_long_gradient_is_shortened_and_a_short_one_is_not(tiny: Make) -> None:
    """Their length is that of all weights together."""
    config = tiny(optimizer="momentum", momentum=0.0, learning_rate=1.0, weight_decay=0.0, clip_norm=2.5)
    for precision in ("float32", "mixed_float16"):
        optimizer = make_optimizer(config, precision)
        first, second = tf.Variable([0.0]), tf.Variable([0.0])
        optimizer.build([first, second])
        optimizer.apply_gradients([(tf.constant([3.0]), first), (tf.constant([4.0]), second)])
        assert [float(first[0]), float(second[0])] == pytest.approx([-1.5, -2.0])
        optimizer.apply_gradients([(tf.constant([0.3]), first), (tf.constant([0.4]), second)])
        assert [float(first[0]), float(second[0])] == pytest.approx([-1.8, -2.4])


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


def test_a_float16_step_takes_the_same_gradients_as_a_float32_one(tiny: Make, slices: list[Slice]) -> None:
    """The loss is scaled before the gradients and they are scaled back: a forgotten one is a factor of 32768."""
    changes = []
    for scales in (False, True):
        trainer = Trainer(tiny(optimizer="momentum", learning_rate=0.1, weight_decay=0.0, dropout=0.0), Cluster())
        if scales:
            trainer.optimizer = tf.keras.mixed_precision.LossScaleOptimizer(trainer.optimizer)
        before = trainer.model.get_weights()
        trainer.step(0, next(iter(windows_of(trainer.config, slices).batches(0, 1, 1))))
        changes.append([new - old for new, old in zip(trainer.model.get_weights(), before)])
    for plain, scaled in zip(*changes):
        np.testing.assert_allclose(scaled, plain, rtol=1e-3, atol=1e-6)
    assert max(np.abs(change).max() for change in changes[0]) > 1e-4


def test_the_loss_scale_and_its_counter_are_among_what_an_optimizer_keeps(tiny: Make) -> None:
    optimizer = make_optimizer(tiny(), "mixed_float16")
    optimizer.build([tf.Variable([1.0])])
    values = [float(tf.reduce_sum(tf.cast(item, tf.float32))) for item in state_of(optimizer)]
    assert float(optimizer.loss_scale) in values
    optimizer._loss_scale.current_loss_scale.assign(4096.0)
    assert 4096.0 in [float(tf.reduce_sum(tf.cast(item, tf.float32))) for item in state_of(optimizer)]
    assert len(state_of(make_optimizer(tiny(loss_scale=128.0), "mixed_float16"))) == len(values) - 4


def test_dropout_is_part_of_a_training_step(tiny: Make, slices: list[Slice]) -> None:
    losses = []
    for dropout in (0.0, 0.5):
        trainer = Trainer(tiny(dropout=dropout), Cluster())
        losses.append(float(trainer.step(0, next(iter(windows_of(trainer.config, slices).batches(0, 1, 1))))))
    assert losses[0] != losses[1]


def test_the_decoder_alone_is_trained_if_asked(tiny: Make, slices: list[Slice]) -> None:
    trainer = Trainer(tiny(train_part="decoder"), Cluster())
    before = trainer.model.get_weights()
    trainer.step(0, next(iter(windows_of(trainer.config, slices).batches(0, 1, 1))))
    kernels = {
        item.name.split("/")[0]: bool((now != old).any())
        for item, now, old in zip(trainer.model.variables, trainer.model.get_weights(), before)
        if "kernel" in item.name
    }
    assert kernels == {name: name.startswith(("up", "logits")) for name in kernels}
    assert len(kernels) == 23
