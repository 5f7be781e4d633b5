"""The tiles that every step is run on: real slices where there are any, else synthetic ones, and it says which."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unet.errors import UnetError
from unet.geometry import plan_tiles
from unet.intensity import find_windows
from unet.volume import open_volume, stacks_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from unet.intensity import WindowChoice

# At the first tile size; memory and time decide. Every other tile size gets one.
BATCH = 3


class TilesError(UnetError):
    """A data folder that holds no slices to measure on."""


@dataclass(frozen=True)
class Tiles:
    """Tiles to compare outputs on.

    Attributes:
        source: where they are from, in words.
        batches: uint8 [N, 1, size, size] each; 3 tiles of the first size, then one of each other size.
    """

    source: str
    batches: tuple[NDArray[np.uint8], ...]

    @property
    def count(self) -> int:
        """Number of tiles."""
        return sum(len(batch) for batch in self.batches)


def gather_tiles(
    data_dir: Path | None,
    tile_sizes: Sequence[int],
    held_out: Mapping[str, Sequence[int]],
    window: WindowChoice = None,
) -> Tiles:
    """Cut tiles from a data folder's first stack, from pages that training did not see where these are known.

    Args:
        data_dir: folder with a ``*-volume.tif``; None takes the synthetic stack.
        tile_sizes: sizes of the tiles.
        held_out: pages kept from training, by file name.
        window: how training chose the intensity window.

    Raises:
        TilesError: the folder has no stack.
        StackError: the stack cannot be read.
    """
    count = BATCH + len(tile_sizes) - 1
    if data_dir is None:
        from unet.phantom import synthetic_stack

        slices = list(synthetic_stack(slices=BATCH)[0])
        source = f"{BATCH} slices of the synthetic stack"
    else:
        slices, source = _read_slices(data_dir, held_out, window)
    sizes = [tile_sizes[0]] * BATCH + list(tile_sizes[1:])
    tiles = [_cut(slices[index % len(slices)], sizes[index], index) for index in range(count)]
    batches = [np.stack(tiles[:BATCH])[:, None], *(tile[None, None] for tile in tiles[BATCH:])]
    return Tiles(source, tuple(batches))


def training_tiles(
    data_dir: Path | None, tile_size: int, held_out: Mapping[str, Sequence[int]], window: WindowChoice = None
) -> list[NDArray[np.uint8]]:
    """One tile of each slice that training saw, uint8 [1, 1, size, size] each, of the stacks in ``held_out``.

    Raises:
        StackError: a stack cannot be read.
    """
    found: list[NDArray[np.uint8]] = []
    for name, pages in held_out.items():
        stack = None if data_dir is None else data_dir / name
        if stack is None or not stack.exists():
            continue
        with open_volume(stack) as reader:
            windows = find_windows(reader, window)
            seen = [page for page in range(len(reader)) if page not in set(pages)]
            cut = [_cut(windows.apply(page, reader[page]), tile_size, number) for number, page in enumerate(seen)]
        found += [tile[np.newaxis, np.newaxis] for tile in cut]
    return found


def _read_slices(
    data_dir: Path, held_out: Mapping[str, Sequence[int]], window: WindowChoice
) -> tuple[list[NDArray[np.uint8]], str]:
    stacks = sorted(stacks_in(data_dir), key=lambda path: (path.name not in held_out, path.name))
    if not stacks:
        raise TilesError(f"{data_dir} has no *-volume.tif to measure on, in any format: name the folder of training")
    with open_volume(stacks[0]) as reader:
        pages = [page for page in held_out.get(stacks[0].name, ()) if page < len(reader)]
        kind = "held-out pages" if pages else "pages"
        pages = _spread(pages or list(range(len(reader))))
        windows = find_windows(reader, window)
        slices = [windows.apply(page, reader[page]) for page in pages]
    return slices, f"{kind} {', '.join(map(str, pages))} of {stacks[0]}"


def _spread(pages: list[int]) -> list[int]:
    """At most ``BATCH`` pages, evenly spread."""
    if len(pages) <= BATCH:
        return pages
    return [pages[round(i * (len(pages) - 1) / (BATCH - 1))] for i in range(BATCH)]


def _cut(image: NDArray[np.uint8], size: int, number: int) -> NDArray[np.uint8]:
    """One tile of a slice: another one of the slice's plan for each number, mirrored borders included."""
    plan = plan_tiles(image.shape[0], image.shape[1], size)
    tile: NDArray[Any] = plan.extract(image, plan.tiles[number % len(plan)])
    return tile
