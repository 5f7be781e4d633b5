from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from train.model.losses import border_weights, segmentation_loss


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


def test_border_weight_equals_the_papers_formula() -> None:
    label = (scipy.ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(80, 90)), 5) > 0).astype(np.uint8)
    cells, count = scipy.ndimage.label(label)
    assert count > 2
    distances = np.sort([scipy.ndimage.distance_transform_edt(cells != index) for index in range(1, count + 1)], axis=0)
    expected = np.where(label == 0, 10 * np.exp(-((distances[0] + distances[1]) ** 2) / 50), 0)
    np.testing.assert_allclose(border_weights(label), expected, atol=10 * np.exp(-(20**2) / 50) + 1e-5)


def test_a_single_cell_has_no_border() -> None:
    assert border_weights(np.ones((20, 20), np.uint8)).max() == 0
