from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from train.model.border import border_weights
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


def test_what_nobody_annotated_draws_no_border() -> None:
    label = np.ones((30, 40), np.uint8)
    label[:, 18:22] = 0
    drawn = border_weights(label)
    assert drawn.dtype == np.float32
    assert drawn[:, 18:22].min() > 1
    hidden = label.copy()
    hidden[:, 22:] = 255
    assert border_weights(hidden).max() == 0  # one cell is left


def test_border_weight_equals_the_papers_formula() -> None:
    label = (scipy.ndimage.gaussian_filter(np.random.default_rng(1).normal(size=(80, 90)), 5) > 0).astype(np.uint8)
    cells, count = scipy.ndimage.label(label)
    assert count > 2
    distances = np.sort([scipy.ndimage.distance_transform_edt(cells != index) for index in range(1, count + 1)], axis=0)
    expected = np.where(label == 0, 10 * np.exp(-((distances[0] + distances[1]) ** 2) / 50), 0)
    np.testing.assert_allclose(border_weights(label), expected, atol=10 * np.exp(-(20**2) / 50) + 1e-5)


def test_a_single_cell_has_no_border() -> None:
    drawn = border_weights(np.ones((20, 30), np.uint8))
    assert drawn.dtype == np.float32
    assert drawn.shape == (20, 30)
    assert drawn.max() == 0
