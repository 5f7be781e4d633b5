from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from train.model.losses import segmentation_loss


def test_cross_entropy_by_hand() -> None:
    logits = tf.constant([[[[0.0, 0.0], [2.0, 0.0]]]])
    labels = tf.constant([[[0, 1]]])
    weights = tf.constant([[[2.0, 1.0]]])
    expected = (2 * np.log(2) + np.log(1 + np.exp(2))) / 2
    assert float(segmentation_loss(logits, labels, weights, "cross_entropy")) == pytest.approx(expected, rel=1e-6)


def test_dice_term_is_zero_for_a_sure_and_right_answer() -> None:
    labels = tf.constant(np.random.default_rng(0).integers(0, 2, (1, 20, 20)))
    logits = (tf.one_hot(labels, 2) - 0.5) * 100
    ones = tf.ones((1, 20, 20))
    assert float(segmentation_loss(logits, labels, ones, "cross_entropy+dice")) == pytest.approx(0, abs=1e-5)
    wrong = float(segmentation_loss(-logits, labels, ones, "cross_entropy+dice"))
    assert wrong - float(segmentation_loss(-logits, labels, ones, "cross_entropy")) == pytest.approx(1, abs=0.02)


def test_halves_of_a_batch_average_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    logits, weights = rng.normal(size=(4, 6, 6, 2)), rng.uniform(1, 9, (4, 6, 6))
    labels = rng.integers(0, 2, (4, 6, 6))
    for loss in ("cross_entropy", "cross_entropy+dice"):
        parts = [float(segmentation_loss(logits[s], labels[s], weights[s], loss)) for s in (slice(2), slice(2, 4))]
        assert float(segmentation_loss(logits, labels, weights, loss)) == pytest.approx(np.mean(parts), rel=1e-6)


@pytest.mark.parametrize("loss", ["cross_entropy", "cross_entropy+dice"])
def test_pixels_without_weight_count_nowhere(loss: str) -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(2, 8, 8, 2)), rng.integers(0, 2, (2, 8, 8))
    weights = rng.uniform(1, 3, (2, 8, 8))
    weights[:, :3] = 0
    hidden_logits, hidden_labels = logits.copy(), labels.copy()
    hidden_logits[:, :3] = 50 * rng.normal(size=(2, 3, 8, 2))
    hidden_labels[:, :3] = 255
    whole = float(segmentation_loss(logits, labels, weights, loss))
    assert float(segmentation_loss(hidden_logits, hidden_labels, weights, loss)) == pytest.approx(whole, rel=1e-9)
    # The mean is over the pixels that count.
    part = float(segmentation_loss(logits[:, 3:], labels[:, 3:], weights[:, 3:], loss))
    assert whole == pytest.approx(part, rel=1e-9)


def test_an_image_of_a_few_annotated_pixels_weighs_less() -> None:
    logits, labels = np.zeros((1, 32, 32, 2)), np.zeros((1, 32, 32), np.int64)
    weights = np.zeros((1, 32, 32))
    weights[0, 0, :16] = 1  # a quarter of the sixteenth that counts in full
    assert float(segmentation_loss(logits, labels, weights, "cross_entropy")) == pytest.approx(np.log(2) / 4)
    # However many images there are.
    answers, truth, costs = (np.repeat(values, 3, axis=0) for values in (logits, labels, weights))
    assert float(segmentation_loss(answers, truth, costs, "cross_entropy")) == pytest.approx(np.log(2) / 4)
