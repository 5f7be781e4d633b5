"""Arithmetic of the valid-convolution U-Net: which sizes fit, and how tiles cover a slice.

Five levels of unpadded 3x3 convolutions eat 92 pixels on each side, so a tile of n x n pixels gives an output of
(n - 184) x (n - 184); four poolings by two make n = 188 + 16k the sizes that fit without a remainder. Ronneberger et
al. (2015) call the scheme overlap-tile: tiles overlap in what they read, never in what they write, and beyond
the slice's border they read its mirror image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError

CONTEXT = 184
HALO = CONTEXT // 2
GRID = 16
MIN_SIZE = 188

AnyArray = npt.NDArray[np.generic]
FloatArray = npt.NDArray[Any]
Slices = tuple[slice, slice]


def is_valid_size(size: int) -> bool:
    """Whether the network takes tiles of ``size`` x ``size`` pixels."""
    return size >= MIN_SIZE and (size - MIN_SIZE) % GRID == 0


def output_size(size: int) -> int:
    """The side, in pixels, of the output of a tile of side ``size``.

    Raises:
        UnetError: if ``size`` is not 188 + 16k.
    """
    if not is_valid_size(size):
        above = valid_size_for(max(1, size - CONTEXT))
        near = str(above) if above == MIN_SIZE else f"{above - GRID} and {above}"
        raise UnetError(f"a tile of {size} pixels does not fit the network, which takes 188 + 16k: near are {near}")
    return size - CONTEXT


def valid_size_for(output: int) -> int:
    """The smallest tile side whose output is at least ``output`` pixels wide.

    Raises:
        UnetError: if ``output`` is not positive.
    """
    if output < 1:
        raise UnetError(f"an output of {output} pixels is no output: it must be at least 1")
    return MIN_SIZE + GRID * max(0, -(-(output + CONTEXT - MIN_SIZE) // GRID))


@dataclass(frozen=True)
class Tile:
    """One tile of a plan.

    Attributes:
        row0: first row of the tile's output, in slice coordinates; a multiple of 16, the pooling grid.
        col0: first column, likewise.
        size: the side of what the tile reads.
        write_row0: first row that this tile writes; the rows before it are an earlier tile's.
        write_row1: one past its last.
        write_col0: first column that it writes.
        write_col1: one past its last.
    """

    row0: int
    col0: int
    size: int
    write_row0: int
    write_row1: int
    write_col0: int
    write_col1: int

    @property
    def read(self) -> Slices:
        """What the tile reads, in coordinates of the slice mirrored outwards by ``HALO`` pixels."""
        return slice(self.row0, self.row0 + self.size), slice(self.col0, self.col0 + self.size)

    @property
    def write(self) -> Slices:
        """What the tile writes, in slice coordinates; disjoint from every other tile's."""
        return slice(self.write_row0, self.write_row1), slice(self.write_col0, self.write_col1)

    @property
    def source(self) -> Slices:
        """The part of the tile's output that goes to ``write``."""
        rows, cols = self.write
        return (
            slice(rows.start - self.row0, rows.stop - self.row0),
            slice(cols.start - self.col0, cols.stop - self.col0),
        )

    def __repr__(self) -> str:
        rows, cols = self.write
        return (
            f"Tile({self.size} at {self.row0},{self.col0} writes [{rows.start}:{rows.stop}, {cols.start}:{cols.stop}])"
        )


@dataclass(frozen=True)
class TilePlan:
    """How tiles of one size cover a slice of ``height`` x ``width`` pixels."""

    height: int
    width: int
    tile_size: int
    tiles: tuple[Tile, ...]

    def __len__(self) -> int:
        return len(self.tiles)

    def extract(self, image: AnyArray, tile: Tile) -> AnyArray:
        """What ``tile`` reads of ``image`` [height, width], mirrored beyond the borders: [size, size]."""
        rows = mirrored_indices(tile.row0 - HALO, tile.size, self.height)
        cols = mirrored_indices(tile.col0 - HALO, tile.size, self.width)
        # Only the window that the tile touches is read: a slice may be a memory-mapped file.
        window = image[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
        return gather(window, rows - rows.min(), cols - cols.min())

    def place(self, output: AnyArray, tile: Tile, into: AnyArray) -> None:
        """Copy the part of a tile's output [size - 184, size - 184] that it writes into ``into`` [height, width]."""
        into[tile.write] = output[tile.source]


def mirrored_indices(first: int, count: int, length: int) -> npt.NDArray[np.intp]:
    """Indices ``first`` ... into an axis of ``length`` that goes on as its mirror image, edge pixel not repeated.

    The same as NumPy's ``pad(mode="reflect")``, over and over where the axis is shorter than the reach.
    """
    if length == 1:
        return np.zeros(count, np.intp)
    period = 2 * (length - 1)
    folded = np.arange(first, first + count) % period
    return np.minimum(folded, period - folded)


def gather(image: AnyArray, rows: npt.NDArray[np.intp], cols: npt.NDArray[np.intp]) -> AnyArray:
    """Rows and columns of an image [H, W] by their indices, [len(rows), len(cols)].

    The same as ``image[np.ix_(rows, cols)]``, which looks up every pixel and takes fifteen times as long. Here
    the columns that follow each other, which are most of a tile's, are copied as they lie.
    """
    taken = image.take(rows, 0)
    ends = np.concatenate([[0], np.flatnonzero(np.diff(cols) != 1) + 1, [len(cols)]])
    longest = int(np.diff(ends).argmax())
    start, stop = ends[longest], ends[longest + 1]
    found = np.empty((len(rows), len(cols)), image.dtype)
    found[:, :start] = taken.take(cols[:start], 1)
    found[:, start:stop] = taken[:, cols[start] : cols[start] + stop - start]
    found[:, stop:] = taken.take(cols[stop:], 1)
    return found


def _intervals(length: int, tile_size: int) -> list[tuple[int, int, int]]:
    """(first output pixel, first written, one past the last written) of each tile along one axis."""
    reach = output_size(tile_size)
    if length <= reach:
        return [(0, 0, length)]
    step = reach // GRID * GRID
    count = 1 - (reach - length) // step
    starts = [index * step for index in range(count)]
    ends = [*starts[1:], length]
    return list(zip(starts, starts, ends))


def plan_tiles(height: int, width: int, tile_size: int) -> TilePlan:
    """Cover a slice with tiles.

    Tile origins are multiples of 16, the pooling grid, so that a tiled prediction equals that of one tile over
    the whole slice.

    Args:
        height: rows of the slice, at least 1.
        width: columns of the slice, at least 1.
        tile_size: side of a tile, 188 + 16k.

    Raises:
        UnetError: if the tile size does not fit the network, gives no whole grid step, or the slice is empty.
    """
    if height < 1 or width < 1:
        raise UnetError(f"a slice of {height} x {width} pixels is empty")
    reach = output_size(tile_size)
    if max(height, width) > reach and reach < GRID:
        raise UnetError(
            f"tiles of {tile_size} pixels write {reach}, less than the pooling grid of {GRID}: "
            f"a slice of {height} x {width} needs tiles of at least {valid_size_for(GRID)}"
        )
    tiles = tuple(
        Tile(row0, col0, tile_size, top, bottom, left, right)
        for row0, top, bottom in _intervals(height, tile_size)
        for col0, left, right in _intervals(width, tile_size)
    )
    return TilePlan(height, width, tile_size, tiles)


def cheapest_tile_size(height: int, width: int, allowed: Sequence[int]) -> int:
    """The tile size that covers a slice with the fewest input pixels, to which the arithmetic is proportional.

    Of two that cost the same the smaller is taken: it needs less memory.

    Raises:
        UnetError: if ``allowed`` is empty, or one of its sizes does not fit the network or the slice.
    """
    if not allowed:
        raise UnetError("no tile size is allowed: the served model must name at least one")
    return min(sorted(allowed), key=lambda size: len(plan_tiles(height, width, size)) * size**2)


def predict_tiled(
    image: AnyArray, plan: TilePlan, predict: Callable[[AnyArray], FloatArray], batch_size: int = 1
) -> FloatArray:
    """Predict a slice tile by tile.

    Args:
        image: the slice, [height, width].
        plan: how it is covered.
        predict: from tiles [N, size, size] to outputs [N, size - 184, size - 184].
        batch_size: tiles per call, at most.

    Returns:
        The outputs put together, [height, width], of the dtype that ``predict`` gives.

    Raises:
        UnetError: if the image is not of the plan's size, or the batch is empty.
    """
    if image.shape != (plan.height, plan.width) or batch_size < 1:
        raise UnetError(
            f"an image of {image.shape} in batches of {batch_size} does not fit a plan for {plan.height} x {plan.width}"
        )
    result: FloatArray = np.empty(0)
    for first in range(0, len(plan), batch_size):
        tiles = plan.tiles[first : first + batch_size]
        outputs = predict(np.stack([plan.extract(image, tile) for tile in tiles]))
        if first == 0:
            result = np.empty((plan.height, plan.width), outputs.dtype)
        for tile, output in zip(tiles, outputs):
            plan.place(output, tile, result)
    return result
