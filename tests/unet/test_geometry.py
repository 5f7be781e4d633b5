from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from train.model.network import build_unet
from unet.errors import UnetError
from unet.geometry import (
    CONTEXT,
    GRID,
    HALO,
    cheapest_tile_size,
    is_valid_size,
    mirrored_indices,
    output_size,
    plan_tiles,
    predict_tiled,
    valid_size_for,
)

sides = st.integers(1, 700)
tile_sizes = st.integers(1, 40).map(lambda k: 188 + 16 * k)


def test_the_published_sizes() -> None:
    assert output_size(572) == 388
    assert output_size(700) == 516
    assert [n for n in range(170, 240) if is_valid_size(n)] == [188, 204, 220, 236]


def test_an_impossible_size_names_its_neighbours() -> None:
    with pytest.raises(UnetError, match="near are 572 and 588"):
        output_size(580)
    with pytest.raises(UnetError, match="near are 188"):
        output_size(10)


@given(output=st.integers(1, 5000))
def test_valid_size_for_is_the_smallest(output: int) -> None:
    size = valid_size_for(output)
    assert is_valid_size(size)
    assert output_size(size) >= output
    assert size == 188 or output_size(size - 16) < output


@given(height=sides, width=sides, tile_size=tile_sizes)
def test_write_slices_cover_every_pixel_exactly_once(height: int, width: int, tile_size: int) -> None:
    plan = plan_tiles(height, width, tile_size)
    covered = np.zeros((height, width), int)
    for tile in plan.tiles:
        covered[tile.write] += 1
        assert (tile.row0 % GRID, tile.col0 % GRID) == (0, 0)
        for written, source, read in zip(tile.write, tile.source, tile.read):
            assert written.stop - written.start == source.stop - source.start > 0
            assert source.start >= 0
            assert source.stop <= output_size(tile_size)
            assert read.stop - read.start == tile_size
    assert (covered == 1).all()


@given(first=st.integers(-400, 400), count=st.integers(1, 60), length=st.integers(1, 30))
def test_mirroring_is_numpys(first: int, count: int, length: int) -> None:
    reach = 1000
    padded = np.pad(np.arange(length), reach, mode="reflect")
    wanted = padded[first + reach : first + reach + count]
    np.testing.assert_array_equal(mirrored_indices(first, count, length), wanted)


@given(height=st.integers(1, 300), width=st.integers(1, 300), tile_size=st.sampled_from((204, 252, 316)))
def test_tiles_read_the_mirrored_slice(height: int, width: int, tile_size: int) -> None:
    image = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width), np.uint8)
    plan = plan_tiles(height, width, tile_size)
    last = plan.tiles[-1]
    below, right = last.row0 + last.size - HALO - height, last.col0 + last.size - HALO - width
    padded = np.pad(image, ((HALO, below), (HALO, right)), mode="reflect")
    for tile in plan.tiles:
        np.testing.assert_array_equal(plan.extract(image, tile), padded[tile.read])


@given(height=sides, width=sides)
def test_the_middle_of_each_tile_put_together_is_the_slice(height: int, width: int) -> None:
    image = np.arange(height * width, dtype=np.int64).reshape(height, width)
    plan = plan_tiles(height, width, 252)
    result = predict_tiled(image, plan, lambda tiles: tiles[:, HALO:-HALO, HALO:-HALO], batch_size=3)
    np.testing.assert_array_equal(result, image)


def test_every_tile_is_predicted_once_and_the_type_is_the_networks() -> None:
    plan, sizes = plan_tiles(300, 300, 252), []

    def predict(tiles: Any) -> Any:
        sizes.append(len(tiles))
        return np.ones((len(tiles), plan.tiles[0].size - CONTEXT, plan.tiles[0].size - CONTEXT), np.float16)

    assert predict_tiled(np.zeros((300, 300), np.uint8), plan, predict, batch_size=7).dtype == np.float16
    assert sizes == [7] * (len(plan) // 7) + [len(plan) % 7] * (len(plan) % 7 > 0)
    sizes.clear()
    predict_tiled(np.zeros((300, 300), np.uint8), plan, predict)
    assert sizes == [1] * len(plan)
    assert plan.tile_size == 252


def test_the_cheapest_tile_size() -> None:
    assert cheapest_tile_size(512, 512, (572, 700)) == 700
    assert cheapest_tile_size(388, 388, (572, 700)) == 572
    assert cheapest_tile_size(100, 100, (700, 572)) == 572
    with pytest.raises(UnetError, match="no tile size"):
        cheapest_tile_size(1, 1, ())


def test_a_plan_that_cannot_be() -> None:
    with pytest.raises(UnetError, match="empty"):
        plan_tiles(0, 5, 572)
    with pytest.raises(UnetError, match="needs tiles of at least 204"):
        plan_tiles(100, 100, 188)
    assert len(plan_tiles(4, 4, 188)) == 1


def test_a_tile_draws_itself() -> None:
    assert repr(plan_tiles(512, 512, 572).tiles[3]) == "Tile(572 at 384,384 writes [384:512, 384:512])"


@pytest.fixture(scope="module")
def network() -> tf.types.experimental.PolymorphicFunction:
    model = build_unet(2, seed=3)
    return tf.function(lambda tiles: model(tiles[..., tf.newaxis])[..., 1], reduce_retracing=True)


@settings(deadline=None, max_examples=12)
@given(height=st.integers(20, 200), width=st.integers(20, 200), tile_size=st.sampled_from((204, 220, 284)))
def test_tiled_prediction_equals_the_whole(
    network: tf.types.experimental.PolymorphicFunction, height: int, width: int, tile_size: int
) -> None:
    image = np.random.default_rng(height + width).uniform(-1, 1, (height, width)).astype(np.float32)
    tiled = predict_tiled(image, plan_tiles(height, width, tile_size), lambda tiles: network(tiles).numpy(), 4)
    whole = plan_tiles(height, width, valid_size_for(max(height, width)))
    assert len(whole) == 1
    expected = predict_tiled(image, whole, lambda tiles: network(tiles).numpy())
    np.testing.assert_allclose(tiled, expected, atol=1e-5)


def test_what_a_tile_writes_depends_on_nothing_beyond_what_it_reads() -> None:
    """The gradient of an output row says on which input rows it depends, in one tile over the whole slice."""
    model = build_unet(2)
    # Weights and input above zero keep every ReLU open; ramps up and down make pooling choose among its pixels.
    model.set_weights([np.abs(weight) + 0.01 for weight in model.get_weights()])
    whole = 284
    plan = plan_tiles(output_size(whole), 1, 220)
    assert len(plan) > 2
    reach = 0
    for ramp in (np.linspace(0, 1, whole), np.linspace(1, 0, whole)):
        image = tf.Variable(np.tile(ramp[np.newaxis, :, np.newaxis, np.newaxis], (1, 1, 188, 1)).astype(np.float32))
        with tf.GradientTape(persistent=True) as tape:
            rows = tf.unstack(tf.reduce_sum(model(image), axis=(0, 2, 3)))
        for tile in plan.tiles:
            read, written = tile.read[0], tile.write[0]
            for row in (written.start, written.stop - 1):
                found = np.nonzero(tape.gradient(rows[row], image)[0, :, 0, 0].numpy())[0]
                assert read.start <= found.min()
                assert found.max() < read.stop
                reach = max(reach, row + HALO - int(found.min()), int(found.max()) - row - HALO)
    # Less would be wasted arithmetic: the pooling grid adds up to its own width to the halo on one side of a pixel.
    assert HALO <= reach < HALO + GRID
