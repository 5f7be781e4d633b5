"""Slices cut into bands of rows, so that a slice of any size passes through a bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.geometry import HALO, mirrored_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unet.geometry import Tile, TilePlan

# Of a band, at least one row of tiles: 8 MiB of float16.
BAND_PX = 2**22


@dataclass(frozen=True)
class Band:
    """Whole rows of tiles of a slice.

    Attributes:
        row0: first row that the tiles write.
        row1: one past their last.
        read0: first row that they read; beyond a border they read its mirror image.
        read1: one past their last.
        tiles: of a plan of the whole slice, so that bands put together equal the slice in one piece.
    """

    row0: int
    row1: int
    read0: int
    read1: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Job:
    """A band with the pixels that it needs.

    Attributes:
        page: the slice, counted from 0.
        band: of that slice.
        tile_size: side of its tiles.
        image: uint8 or uint16 [R, W], the slice's rows from ``first_row`` on, at least those that the band reads.
        first_row: in the slice.
        height: rows of the slice.
    """

    page: int
    band: Band
    tile_size: int
    image: npt.NDArray[Any]
    first_row: int
    height: int


def band_of(plan: TilePlan, tiles: Sequence[Tile]) -> Band:
    """The band that whole rows of a plan's tiles make."""
    rows = np.concatenate([mirrored_indices(t.row0 - HALO, t.size, plan.height) for t in (tiles[0], tiles[-1])])
    return Band(tiles[0].write_row0, tiles[-1].write_row1, int(rows.min()), int(rows.max()) + 1, tuple(tiles))


def bands_of(plan: TilePlan, pixels: int = BAND_PX) -> tuple[Band, ...]:
    """A plan's tiles as bands of about as many pixels, at least one row of tiles each."""
    rows: dict[int, list[Tile]] = {}
    for tile in plan.tiles:
        rows.setdefault(tile.row0, []).append(tile)
    bands: list[list[Tile]] = []
    for tiles in rows.values():
        if bands and (tiles[-1].write_row1 - bands[-1][0].write_row0) * plan.width <= pixels:
            bands[-1].extend(tiles)
        else:
            bands.append(list(tiles))
    return tuple(band_of(plan, tiles) for tiles in bands)


def turned(tile: npt.NDArray[Any], view: int) -> npt.NDArray[Any]:
    """One of the eight views of a square: 0 is itself, 1 to 3 are turned by quarters, 4 to 7 mirrored too."""
    return np.rot90(tile.T if view >= 4 else tile, view % 4)


def turned_back(tile: npt.NDArray[Any], view: int) -> npt.NDArray[Any]:
    """Undo ``turned``."""
    straight = np.rot90(tile, -(view % 4))
    return straight.T if view >= 4 else straight
