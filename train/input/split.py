"""Which part of each labelled stack trains the network, chooses among its weights, and scores it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from train.config import FOLDS, TrainConfig
from train.errors import TrainError
from train.input.pairs import find_pairs
from train.input.store import IN_MEMORY_BYTES, Slice, bytes_of, load_stack
from unet.geometry import HALO
from unet.volume import NOT_ANNOTATED, open_volume

if TYPE_CHECKING:
    pass

# Rows of a slice that are worth a score, and that training must keep.
_LEAST_ROWS = 32
_LEAST_TRAINED_SHARE = 0.25


@dataclass(frozen=True)
class Part:
    """A part of a stack: whole pages, or a band of rows of each of them.

    Attributes:
        pages: which pages.
        rows: first row and one past the last; None for whole pages.
    """

    pages: tuple[int, ...] = ()
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class StackSplit:
    """How one stack is divided; what neither part holds trains, but for the gap beside a band of rows."""

    held_out: Part = Part()
    validation: Part = Part()


@dataclass(frozen=True)
class Data:
    """The labelled slices of a run.

    Attributes:
        training: what training sees.
        validation: what chooses the best weights and the threshold.
        held_out: what is scored and decides nothing.
        splits: by the name of a stack's images file.
        pixel_size_nm: depth, height and width of a pixel of each stack, None for what its file does not say.
    """

    training: list[Slice] = field(default_factory=list)
    validation: list[Slice] = field(default_factory=list)
    held_out: list[Slice] = field(default_factory=list)
    splits: dict[str, StackSplit] = field(default_factory=dict)
    pixel_size_nm: dict[str, tuple[float | None, ...]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """What a run's ``config.json`` keeps of the division, for `recorded_splits`."""
        kept: dict[str, Any] = {"stacks": list(self.splits), "pixel_size_nm": self.pixel_size_nm}
        for name in ("held_out", "validation"):
            parts = {stack: getattr(split, name) for stack, split in self.splits.items()}
            kept[name] = {stack: list(part.pages) for stack, part in parts.items() if part.pages and part.rows is None}
            kept[f"{name}_rows"] = {stack: list(part.rows) for stack, part in parts.items() if part.rows is not None}
        return kept


def recorded_splits(record: Mapping[str, Any], pages: Mapping[str, int]) -> dict[str, StackSplit]:
    """How a run divided its stacks.

    Args:
        record: its ``config.json``.
        pages: number of pages of each stack that is there, by its file's name.
    """
    splits = {}
    for stack in record.get("stacks", pages):
        parts = []
        for name in ("held_out", "validation"):
            rows = record.get(f"{name}_rows", {}).get(stack)
            whole = tuple(range(pages.get(stack, 0))) if rows else tuple(record.get(name, {}).get(stack, ()))
            parts.append(Part(whole, (rows[0], rows[1]) if rows else None))
        splits[stack] = StackSplit(*parts)
    return splits


def fold_of(count: int, fold: int, folds: int = FOLDS) -> range:
    """The slices, or rows, that fold ``fold`` holds out: consecutive ones, since neighbouring slices look alike."""
    return range(fold * count // folds, (fold + 1) * count // folds)


def split_stack(name: str, slices: int, height: int, fold: int, validation_share: float) -> StackSplit:
    """Divide a stack by pages, or by rows of its pages where these are too few to make five folds.

    Args:
        name: of the stack, for errors.
        slices: number of pages.
        height: rows of a page.
        fold: which to hold out; -1 for none.
        validation_share: of what is left.

    Raises:
        TrainError: if the stack is too small for folds.
    """
    if slices >= FOLDS:
        held_out = tuple(fold_of(slices, fold)) if fold >= 0 else ()
        left = [page for page in range(slices) if page not in held_out]
        count = max(1, round(validation_share * len(left))) if validation_share > 0 else 0
        # Spread over the stack: neighbours alone, which look alike, choose other weights and another threshold.
        validation = tuple(left[(2 * place + 1) * len(left) // (2 * count)] for place in range(count))
        return StackSplit(Part(held_out), Part(validation))
    pages = tuple(range(slices))
    rows = fold_of(height, fold) if fold >= 0 else range(height, height)
    if fold >= 0 and (len(rows) < _LEAST_ROWS or trained_rows(height, rows, range(0)) < _LEAST_TRAINED_SHARE * height):
        raise TrainError(
            f"{name} has {slices} slices of {height} rows, too few for folds: annotate {FOLDS} or more, or train "
            "without --crossvalidation_idx"
        )
    held_out_part = Part(pages, (rows.start, rows.stop)) if fold >= 0 else Part()
    count = max(_LEAST_ROWS, round(validation_share * height)) if validation_share > 0 else 0
    band = _band_beside(rows, height, count, gap=HALO if fold >= 0 else 0)
    if count == 0 or trained_rows(height, rows, band) < _LEAST_TRAINED_SHARE * height:
        return StackSplit(held_out_part)
    return StackSplit(held_out_part, Part(pages, (band.start, band.stop)))


def _band_beside(rows: range, height: int, count: int, gap: int) -> range:
    """``count`` rows before ``rows``, a gap between, or after them where there is no room before."""
    stop = rows.start - gap
    if stop - count >= 0:
        return range(stop - count, stop)
    return range(rows.stop + gap, min(height, rows.stop + gap + count))


def trained_rows(height: int, *bands: range) -> int:
    """The rows of a page that are left to training: not in a band, nor nearer to one than the network sees."""
    return int(np.count_nonzero(_trained(height, bands)))


def _trained(height: int, bands: Sequence[range]) -> Any:
    kept = np.ones(height, bool)
    for band in bands:
        if len(band):
            kept[max(0, band.start - HALO) : band.stop + HALO] = False
    return kept


def load_data(config: TrainConfig, record: Mapping[str, Any] | None = None) -> Data:
    """The labelled slices of the data folder, divided.

    Args:
        config: names the folder and how its labels are understood.
        record: ``config.json`` of the run that divided them; without one they are divided as the configuration says.

    Raises:
        TrainError: if a stack of the run is missing, or nothing is left to train on.
        StackError: if a stack cannot be read.
    """
    pairs = find_pairs(config.data_dir)
    sizes, pixel_size_nm = {}, {}
    for images, _ in pairs:
        with open_volume(images) as reader:
            sizes[images.name] = (len(reader), reader.height)
            pixel_size_nm[images.name] = reader.metadata.pixel_size_nm
    if record:
        splits = recorded_splits(record, {name: pages for name, (pages, _) in sizes.items()})
    else:
        idx, share = config.crossvalidation_idx, config.validation_share
        splits = {name: split_stack(name, *size, idx, share) for name, size in sizes.items()}
    missing = set(splits) - {images.name for images, _ in pairs}
    if missing:
        raise TrainError(
            f"{config.data_dir} has no {', '.join(sorted(missing))}, on which the run was trained: name the folder of "
            "its stacks with --data_dir"
        )
    in_memory = sum(bytes_of(pair, config.border_weight) for pair in pairs) <= IN_MEMORY_BYTES
    data = Data(
        splits={images.name: splits[images.name] for images, _ in pairs if images.name in splits},
        pixel_size_nm={name: size for name, size in pixel_size_nm.items() if name in splits},
    )
    for pair in pairs:
        if pair[0].name in data.splits:
            slices = load_stack(
                pair, config.label_options, config.border_weight, config.window_choice, in_memory=in_memory
            )
            _divide(slices, data.splits[pair[0].name], data)
    if not data.training:
        raise TrainError(f"no slice of {config.data_dir} is left to train on: annotate more, or hold out fewer")
    return data


def _divide(slices: Sequence[Slice], split: StackSplit, data: Data) -> None:
    for part, into in ((split.held_out, data.held_out), (split.validation, data.validation)):
        for page in part.pages:
            if page >= len(slices):
                raise TrainError(f"{slices[0].name} is of a stack of {len(slices)} pages, but the run held out {page}")
            into.append(_cut(slices[page], part.rows))
    bands = [range(*part.rows) for part in (split.held_out, split.validation) if part.rows is not None]
    whole = {page for part in (split.held_out, split.validation) if part.rows is None for page in part.pages}
    for page, item in enumerate(slices):
        if page in whole:
            continue
        if bands:
            # The parts above hold copies of their rows.
            item.label[~_trained(len(item.label), bands)] = NOT_ANNOTATED
        data.training.append(item)
    for items in (data.training, data.validation, data.held_out):
        items[:] = [item for item in items if item.annotated]
        for item in items:
            item.release()


def _cut(item: Slice, rows: tuple[int, int] | None) -> Slice:
    """A band of a slice, with what the network sees around it; its label counts in the band alone."""
    if rows is None:
        return item
    band = item.part(range(*rows), range(item.label.shape[1]))
    return dataclasses.replace(band, name=f"{item.name} rows {rows[0]} to {rows[1]}")
