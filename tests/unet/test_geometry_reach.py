from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
from hypothesis import example, given, settings
from hypothesis import strategies as st

from unet.errors import UnetError
from unet.geometry import (
    GRID,
    HALO,
    MIN_SIZE,
    cheapest_tile_size,
    output_size,
    plan_tiles,
    predict_tiled,
    valid_size_for,
)

Array = npt.NDArray[Any]
lengths = st.integers(1, 700)
# 204 is the smallest that gives a whole grid step.
tile_sizes = st.integers(1, 24).map(lambda k: 188 + GRID * k)


def convolve_twice(image: Array, weight: int) -> Array:
    """Two valid 3 x 3 convolutions with asymmetric integer weights, modulo a prime so that nothing overflows."""
    kernel = np.array([[1, 2, 3], [4, 5 + weight, 6], [7, 8, 9]], np.int64)
    for _ in range(2):
        side = image.shape[-1] - 2
        shifted = (kernel[i, j] * image[:, i : i + side, j : j + side] for i in range(3) for j in range(3))
        image = sum(shifted, np.zeros_like(image[:, :side, :side])) % 10007
    return image


def unet_like(image: Array) -> Array:
    """A five-level U-Net with one integer channel, [N, n, n] to [N, n - 184, n - 184].

    It has the network's geometry without its weights: pooling is a weighted sum of all four pixels and upsampling
    gives each of the four another value, so that every dependence that the real network can have is there, and
    equality is to the bit.
    """
    skips = []
    for level in range(4):
        image = convolve_twice(image, level)
        skips.append(image)
        assert image.shape[-1] % 2 == 0, "the size does not fit the poolings"
        even, odd = image[:, ::2], image[:, 1::2]
        image = (even[..., ::2] + 2 * odd[..., ::2] + 3 * even[..., 1::2] + 5 * odd[..., 1::2]) % 10007
    image = convolve_twice(image, 4)
    for level in (3, 2, 1, 0):
        image = upsample(image)
        side = image.shape[-1]
        cut = (skips[level].shape[-1] - side) // 2
        image = convolve_twice(image + 3 * skips[level][:, cut : cut + side, cut : cut + side], level)
    return image


def upsample(image: Array) -> Array:
    count, side = image.shape[0], image.shape[-1]
    result = np.empty((count, 2 * side, 2 * side), np.int64)
    for factor, row, col in ((1, 0, 0), (2, 0, 1), (3, 1, 0), (5, 1, 1)):
        result[:, row::2, col::2] = image * factor % 10007
    return result


class OnlyWindows:
    """An image that tells how much of it is read."""

    def __init__(self, image: Array) -> None:
        self.image = image
        self.most = 0

    def __getitem__(self, key: Any) -> Array:
        window: Array = self.image[key]
        self.most = max(self.most, window.size)
        return window


def test_only_the_window_of_a_tile_is_read() -> None:
    image = OnlyWindows(np.zeros((3000, 3000), np.uint8))
    plan = plan_tiles(3000, 3000, 572)
    for tile in plan.tiles:
        plan.extract(image, tile)  # type: ignore[arg-type]
    assert image.most == 572**2


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.sampled_from([204, 236, 252]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
@example(133, 97, 204, 3, 0)
def test_tiled_equals_whole(height: int, width: int, size: int, batch_size: int, seed: int) -> None:
    """To the bit, with the geometry of the network in integers."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width))
    whole_plan = plan_tiles(height, width, valid_size_for(max(height, width)))
    assert len(whole_plan) == 1
    whole = predict_tiled(image, whole_plan, unet_like)
    tiled = predict_tiled(image, plan_tiles(height, width, size), unet_like, batch_size)
    assert np.array_equal(tiled, whole)


def test_off_the_pooling_grid_tiled_would_differ() -> None:
    """Why tile origins are multiples of 16: the same tile read 4 pixels further on gives other values."""
    image = np.random.default_rng(0).integers(0, 256, (1, 240, 240))
    whole = unet_like(image[:, :236, :236])
    shifted = unet_like(image[:, 4:240, 4:240])
    on_grid = unet_like(image[:, 16:236, 16:236])
    assert np.array_equal(on_grid[0], whole[0, 16:, 16:])
    assert not np.array_equal(shifted[0, :-4, :-4], whole[0, 4:, 4:])


def test_the_halo_is_the_measured_reach() -> None:
    """Change one input row at a time and see which output rows change.

    A tile whose output starts at a multiple of 16 sees all that its outputs depend on, and needs every row that it
    reads: the halo is neither too small nor too large. A single output reaches up to 15 pixels further than the halo,
    to the edges of its block of the pooling grid; these lie in the tile because its origin is on the grid.
    """
    size = 236
    rng = np.random.default_rng(1)
    image = rng.integers(0, 256, (1, size, size))
    before = unet_like(image)[0]
    changed = np.zeros((size, output_size(size)), bool)
    for row in range(size):
        other = image.copy()
        other[0, row] = rng.integers(0, 256, size)
        changed[row] = (unet_like(other)[0] != before).any(axis=1)
    first = changed.argmax(axis=0)
    last = size - 1 - changed[::-1].argmax(axis=0)
    outputs = np.arange(output_size(size))
    assert (first == outputs // GRID * GRID).all()
    # 4 = 188 - 184: the outputs of the smallest tile, which all see the whole of it.
    assert (last == MIN_SIZE - 1 + -(-(outputs - 3) // GRID) * GRID).all()
    assert (first.min(), last.max()) == (0, size - 1)


@given(lengths, lengths, st.lists(tile_sizes, min_size=1, max_size=4))
def test_the_cheapest_size_reads_the_fewest_pixels(height: int, width: int, allowed: list[int]) -> None:
    best = cheapest_tile_size(height, width, allowed)

    def cost(size: int) -> tuple[int, int]:
        return len(plan_tiles(height, width, size)) * size**2, size

    assert best in allowed
    assert cost(best) == min(cost(size) for size in allowed)


def test_tiled_smoothing_of_a_slice_smaller_than_the_halo() -> None:
    """A plain filter as the oracle: the mirror goes on beyond a slice that is shorter than the halo."""
    image = np.random.default_rng(2).random((20, 33))
    plan = plan_tiles(20, 33, 204)

    def smooth(tiles: Array) -> Array:
        full = np.stack([scipy.ndimage.gaussian_filter(tile, 5, mode="mirror", truncate=4) for tile in tiles])
        return np.asarray(full[:, HALO:-HALO, HALO:-HALO])

    expected = scipy.ndimage.gaussian_filter(image, 5, mode="mirror", truncate=4)
    assert np.allclose(predict_tiled(image, plan, smooth), expected)


@pytest.mark.parametrize(("height", "batch_size"), [(6, 1), (5, 0)])
def test_what_does_not_fit_a_plan(height: int, batch_size: int) -> None:
    with pytest.raises(UnetError, match=f"in batches of {batch_size} does not fit a plan for 5 x 4"):
        predict_tiled(np.zeros((height, 4)), plan_tiles(5, 4, 204), unet_like, batch_size)
