from __future__ import annotations

import numpy as np
import pytest

from unet.errors import UnetError
from unet.intensity import normalise, to_uint8


def test_normalise_covers_minus_one_to_one() -> None:
    values = normalise(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.arange(256) / 127.5 - 1, atol=1e-6)


def test_uint8_stays_without_a_window() -> None:
    image = np.arange(256, dtype=np.uint8)
    assert to_uint8(image) is image


def test_a_window_is_linear_and_clips() -> None:
    image = np.array([0, 1000, 2000, 3000, 9000], np.uint16)
    assert to_uint8(image, (1000, 3000)).tolist() == [0, 0, 128, 255, 255]


def test_what_cannot_be_windowed() -> None:
    with pytest.raises(UnetError, match="need a window"):
        to_uint8(np.zeros(1, np.uint16))
    with pytest.raises(UnetError, match="is empty"):
        to_uint8(np.zeros(1, np.uint16), (5, 5))
