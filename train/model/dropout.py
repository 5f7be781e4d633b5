"""Dropout whose mask depends on the training window alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf


class WindowDropout(tf.keras.layers.Layer):
    """Dropout with one mask per numbered training window.

    Keras' own layer draws from a stream with a state, so a resumed run, or the same global batch on another number of
    ranks, would see other masks. Here the mask follows from ``seed`` and the window's number.

    Args:
        rate: share of activations that are dropped; the others are divided by ``1 - rate``.
        seed: the layer's seed.
        first_window: scalar int64 variable, the number of the first window of the batch; the others follow it.
    """

    def __init__(self, rate: float, seed: int, first_window: tf.Variable, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate
        self.seed = seed
        # Held in a function, so that Keras does not take it for a weight of the model.
        self._first_window: Callable[[], tf.Variable] = lambda: first_window

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """Drop while training, else pass ``inputs`` [N, H, W, C] through."""
        if not training or self.rate == 0:
            return inputs
        shape = tf.shape(inputs)
        numbers = self._first_window() + tf.range(tf.cast(shape[0], tf.int64))
        kept = tf.map_fn(
            lambda number: tf.random.stateless_uniform(shape[1:], tf.stack([self.seed, number])) >= self.rate,
            numbers,
            fn_output_signature=tf.TensorSpec(inputs.shape[1:], tf.bool),
        )
        return tf.where(kept, inputs / (1 - self.rate), tf.zeros_like(inputs))
