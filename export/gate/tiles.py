"""The tiles that every step is run on: real slices where there are any, else synthetic ones, and it says which."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from unet.geometry import plan_tiles
from unet.intensity import WindowChoice, find_windows, parse_window
from unet.names import DEFAULT_THRESHOLD
from unet.volume import MASKS, LabelOptions, open_volume, stacks_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# At the first tile size; memory and time decide. Every other tile size gets one.
BATCH = 3


@dataclass(frozen=True)
class Source:
    """The stacks to measure on, understood as training understood them.

    Attributes:
        data_dir: folder with a ``*-volume.tif``; None takes the synthetic stack.
        held_out: pages kept from training, by file name.
        labels: how training understood the labels.
        window: how training chose the intensity window.
        threshold: that training chose, which clients cut at.
    """

    data_dir: Path | None
    held_out: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: LabelOptions = MASKS
    window: WindowChoice = None
    threshold: float = DEFAULT_THRESHOLD

    @classmethod
    def of(
        cls,
        data_dir: Path | None,
        held_out: Mapping[str, Sequence[int]],
        training: Mapping[str, Any],
        threshold: float | None,
    ) -> Source:
        """By the settings of the training.

        Args:
            data_dir: the named folder; None takes the default one, see `data_folder`.
            held_out: pages kept from training, by file name.
            training: its settings.
            threshold: that it chose; None if it chose none.
        """
        window = parse_window(str(training.get("window", "")).split())
        cut = DEFAULT_THRESHOLD if threshold is None else threshold
        return cls(data_folder(data_dir), held_out, LabelOptions.of(training), window, cut)


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


def data_folder(named: Path | None) -> Path | None:
    """The folder to measure on: the named one, else $DATA_DIR or data where it has a stack; None where it has none."""
    if named is not None:
        return named
    default = Path(os.environ.get("DATA_DIR", "data"))
    return default if stacks_in(default) else None


def gather_tiles(source: Source, tile_sizes: Sequence[int]) -> Tiles:
    """Cut tiles from a data folder's first stack, from pages that training did not see where these are known.

    Args:
        source: the stacks.
        tile_sizes: sizes of the tiles.

    Raises:
        ExportError: the folder has no stack.
        StackError: the stack cannot be read.
    """
    count = BATCH + len(tile_sizes) - 1
    slices, words = _slices(source, BATCH)
    sizes = [tile_sizes[0]] * BATCH + list(tile_sizes[1:])
    tiles = [_cut(slices[index % len(slices)], sizes[index], index) for index in range(count)]
    batches = [np.stack(tiles[:BATCH])[:, None], *(tile[None, None] for tile in tiles[BATCH:])]
    return Tiles(words, tuple(batches))


def distinct_tiles(source: Source, tile_size: int, count: int) -> NDArray[np.uint8]:
    """Tiles of one size for a batch, no two the same, so that an engine that mixes up its answers is seen.

    Of the slices that `gather_tiles` takes: other places first, then the same turned, mirrored and moved. Where the
    slices are uniform, noise makes up the number.

    Returns:
        uint8 [count, 1, tile_size, tile_size].

    Raises:
        ExportError: the folder has no stack.
        StackError: the stack cannot be read.
    """
    slices, _ = _slices(source, count)
    places = len(plan_tiles(slices[0].shape[0], slices[0].shape[1], tile_size))
    found: dict[bytes, NDArray[np.uint8]] = {}
    for number in range(4 * count + 8 * places * len(slices)):
        if len(found) == count:
            break
        rest, page = divmod(number, len(slices))
        way, place = divmod(rest, places)
        tile = np.rot90(_cut(slices[page], tile_size, place), way % 4)
        tile = np.roll(tile.T if way // 4 % 2 else tile, 16 * (way // 8), axis=0)
        found.setdefault(tile.tobytes(), np.ascontiguousarray(tile))
    noise = np.random.default_rng(0).integers(0, 256, (count - len(found), tile_size, tile_size), np.uint8)
    tiles: NDArray[np.uint8] = np.stack([*found.values(), *noise])[:, np.newaxis]
    return tiles


def training_tiles(source: Source, tile_size: int) -> list[NDArray[np.uint8]]:
    """One tile of each slice that training saw, uint8 [1, 1, size, size] each, of the stacks in ``held_out``.

    Raises:
        StackError: a stack cannot be read.
    """
    found: list[NDArray[np.uint8]] = []
    for name, pages in source.held_out.items():
        stack = None if source.data_dir is None else source.data_dir / name
        if stack is None or not stack.exists():
            continue
        with open_volume(stack) as reader:
            windows = find_windows(reader, source.window)
            seen = [page for page in range(len(reader)) if page not in set(pages)]
            cut = [_cut(windows.apply(page, reader[page]), tile_size, number) for number, page in enumerate(seen)]
        found += [tile[np.newaxis, np.newaxis] for tile in cut]
    return found


def _slices(source: Source, most: int) -> tuple[list[NDArray[np.uint8]], str]:
    """Slices to cut tiles from, and where they are from."""
    data_dir, held_out = source.data_dir, source.held_out
    if data_dir is None:
        from unet.phantom import synthetic_stack

        return list(synthetic_stack(slices=BATCH)[0]), f"{BATCH} slices of the synthetic stack"
    stacks = sorted(stacks_in(data_dir), key=lambda path: (path.name not in held_out, path.name))
    if not stacks:
        raise ExportError(f"{data_dir} has no *-volume.tif to measure on, in any format: name the folder of training")
    with open_volume(stacks[0]) as reader:
        pages = [page for page in held_out.get(stacks[0].name, ()) if page < len(reader)]
        kind = "held-out pages" if pages else "pages"
        pages = _spread(pages or list(range(len(reader))), most)
        windows = find_windows(reader, source.window)
        slices = [windows.apply(page, reader[page]) for page in pages]
    return slices, f"{kind} {', '.join(map(str, pages))} of {stacks[0]}"


def _spread(pages: list[int], most: int) -> list[int]:
    """At most so many pages, evenly spread."""
    if len(pages) <= most:
        return pages
    return [pages[round(i * (len(pages) - 1) / (most - 1))] for i in range(most)]


def _cut(image: NDArray[np.uint8], size: int, number: int) -> NDArray[np.uint8]:
    """One tile of a slice: another one of the slice's plan for each number, mirrored borders included."""
    plan = plan_tiles(image.shape[0], image.shape[1], size)
    tile: NDArray[Any] = plan.extract(image, plan.tiles[number % len(plan)])
    return tile
