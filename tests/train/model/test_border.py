from __future__ import annotations

import numpy as np
import scipy.ndimage

from train.model.border import border_weights


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
