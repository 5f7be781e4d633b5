"""Pixel-wise losses on logits."""

from __future__ import annotations

import tensorflow as tf

# An image of which less is annotated counts less: the gradient of a few pixels is mostly noise.
_FULL_SHARE = 1 / 16


def segmentation_loss(logits: tf.Tensor, labels: tf.Tensor, weights: tf.Tensor, loss: str) -> tf.Tensor:
    """The loss of a batch.

    Args:
        logits: float32 [N, H, W, 2].
        labels: integer [N, H, W], 0 membrane, 1 not.
        weights: float32 [N, H, W], what an error at each pixel costs; 0 where it counts nowhere.
        loss: one of `train.config.LOSSES`.

    Returns:
        A scalar: the mean over images of the weighted cross-entropy, summed and divided by the pixels that count, plus,
        if asked for, one minus the soft Dice coefficient of the membrane's softmax probability.
    """
    counts = tf.cast(weights > 0, weights.dtype)
    labels = tf.where(weights > 0, labels, tf.zeros_like(labels))
    entropy = tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits)
    # Each image is divided by its own pixels, not by its weights: a global batch split over ranks has the same sum.
    pixels = tf.cast(tf.reduce_prod(tf.shape(weights)[1:]), weights.dtype)
    counted = tf.maximum(tf.reduce_sum(counts, axis=(1, 2)), pixels * _FULL_SHARE)
    total = tf.reduce_mean(tf.reduce_sum(entropy * weights, axis=(1, 2)) / counted)
    if loss == "cross_entropy+dice":
        probability = tf.nn.softmax(logits)[..., 0] * tf.cast(counts, logits.dtype)
        membrane = tf.cast(tf.equal(labels, 0), probability.dtype) * tf.cast(counts, logits.dtype)
        overlap = tf.reduce_sum(probability * membrane, axis=(1, 2))
        size = tf.reduce_sum(probability + membrane, axis=(1, 2))
        total += tf.reduce_mean(1 - (2 * overlap + 1) / (size + 1))
    return total
