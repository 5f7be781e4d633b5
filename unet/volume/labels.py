"""Labels: which pixels are membrane, read from masks or from ids of cells."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.volume.limits import LABEL_LIMITS, StackError
from unet.volume.opening import open_volume
from unet.volume.volume import BLOCK_PX

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MEMBRANE, NOT_MEMBRANE, NOT_ANNOTATED = 0, 1, 255
# Membrane is the minority in any tissue.
_MOST_MEMBRANE = 0.5
_NAMED_VALUES = 4


@dataclass(frozen=True)
class LabelOptions:
    """How the values of a label stack are understood.

    Attributes:
        membrane_value: the value that means membrane. None takes 0 and refuses an implausible share of membrane.
            With ids of cells: the id of what is no cell, if there is one.
        ignore_label: the value of pixels that nobody annotated; None if every pixel is annotated.
        membrane_width: 0 for masks of two values. Another number says that the values are ids of cells: membrane is
            where neighbours in a slice differ, so many pixels wide.
    """

    membrane_value: int | None = None
    ignore_label: int | None = None
    membrane_width: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LabelOptions:
        """From the settings of a training run, where -1 says that a value was not given."""
        value, ignored = (int(settings.get(name, -1)) for name in ("membrane_value", "ignore_label"))
        return cls(
            None if value < 0 else value, None if ignored < 0 else ignored, int(settings.get("membrane_width", 0))
        )


MASKS = LabelOptions()


def add_label_flags(parser: argparse.ArgumentParser) -> None:
    """The flags from which ``label_options`` makes the options."""
    parser.add_argument(
        "--membrane_value", type=int, help="the labels' value of membrane (default: 0, if its share is plausible)"
    )
    parser.add_argument("--ignore_label", type=int, help="the labels' value of pixels that nobody annotated")
    parser.add_argument(
        "--membrane_width", type=int, default=0,
        help="the labels are ids of cells; membrane is where neighbours differ, so many pixels wide",
    )  # fmt: skip


def label_options(chosen: argparse.Namespace) -> LabelOptions:
    """The options that the flags of ``add_label_flags`` ask for."""
    return LabelOptions(chosen.membrane_value, chosen.ignore_label, chosen.membrane_width)


def read_labels(path: str | os.PathLike[str], options: LabelOptions = MASKS) -> npt.NDArray[np.uint8]:
    """A stack of labels, uint8 [N, H, W]: 0 membrane, 1 not, 255 not annotated.

    Args:
        path: a stack of masks with two values, or of ids of cells where the options say so.
        options: how its values are understood.

    Raises:
        StackError: if the file cannot be read, has more values than a mask, or an implausible share of membrane.
    """
    with open_volume(path, LABEL_LIMITS) as reader:
        labels = np.empty((reader.pages, reader.height, reader.width), np.uint8)
    for page, row0, rows in label_blocks(path, options):
        labels[page, row0 : row0 + len(rows)] = rows
    return labels


def label_blocks(
    path: str | os.PathLike[str], options: LabelOptions = MASKS, block_px: int = BLOCK_PX
) -> Iterator[tuple[int, int, npt.NDArray[np.uint8]]]:
    """The labels of `read_labels` by blocks of rows, as (page, first row, rows): a page need not fit into memory.

    Args:
        path: as for `read_labels`.
        options: as for `read_labels`.
        block_px: pixels of a block, at most.

    Raises:
        StackError: as `read_labels`; it is raised at the block, or after the last one, that shows the fault.
    """
    with open_volume(path, LABEL_LIMITS) as reader:
        values: set[int] = set() if options.membrane_value is None else {options.membrane_value}
        pages = np.zeros((reader.pages, 2), np.int64)
        step = max(1, block_px // reader.width)
        margin = options.membrane_width
        for page in range(reader.pages):
            for row0 in range(0, reader.height, step):
                row1 = min(reader.height, row0 + step)
                top = max(0, row0 - margin)
                around = reader.rows(page, top, min(reader.height, row1 + margin))
                if options.membrane_width > 0:
                    rows = labels_of_ids(around, options)[row0 - top :][: row1 - row0]
                else:
                    values.update(int(value) for value in np.unique(around) if int(value) != options.ignore_label)
                    if len(values | {0} if options.membrane_value is None else values) > 2:
                        raise StackError(_too_many(path, page, values, options))
                    rows = _labels_of_mask(around, options)
                pages[page] += np.count_nonzero(rows == MEMBRANE), np.count_nonzero(rows == NOT_MEMBRANE)
                yield page, row0, rows
        _check_share(path, pages, reader.height * reader.width, options)


def labels_of_ids(ids: npt.NDArray[Any], options: LabelOptions) -> npt.NDArray[np.uint8]:
    """The labels of a slice of cell ids, [H, W]: membrane lies between two ids and where the membrane's own id is."""
    known = np.ones(ids.shape, bool) if options.ignore_label is None else ids != options.ignore_label
    across = (ids[:, :-1] != ids[:, 1:]) & known[:, :-1] & known[:, 1:]
    down = (ids[:-1] != ids[1:]) & known[:-1] & known[1:]
    membrane = np.zeros(ids.shape, bool)
    membrane[:, :-1] |= across
    membrane[:-1] |= down
    if options.membrane_width % 2 == 0:
        membrane[:, 1:] |= across
        membrane[1:] |= down
    if wider := (options.membrane_width - 1) // 2:
        import scipy.ndimage

        membrane = np.asarray(scipy.ndimage.binary_dilation(membrane, iterations=wider))
    if options.membrane_value is not None:
        membrane |= ids == options.membrane_value
    labels: npt.NDArray[np.uint8] = np.where(membrane, MEMBRANE, NOT_MEMBRANE).astype(np.uint8)
    labels[~known] = NOT_ANNOTATED
    return labels


def _labels_of_mask(page: npt.NDArray[Any], options: LabelOptions) -> npt.NDArray[np.uint8]:
    labels: npt.NDArray[np.uint8] = (page != (options.membrane_value or 0)).astype(np.uint8)
    if options.ignore_label is not None:
        labels[page == options.ignore_label] = NOT_ANNOTATED
    return labels


def _too_many(path: str | os.PathLike[str], index: int, values: set[int], options: LabelOptions) -> str:
    membrane = options.membrane_value or 0
    others = sorted(values - {membrane})
    named = ", ".join(str(value) for value in others[:_NAMED_VALUES])
    more = " ..." if len(others) > _NAMED_VALUES else ""
    return (
        f"{path} has the values {named}{more} beside {membrane} by page {index}, and a mask has two: name the value of "
        "membrane with --membrane_value and that of pixels nobody annotated with --ignore_label; if the values are "
        "ids of cells, add --membrane_width 2"
    )


def _check_share(
    path: str | os.PathLike[str], pages: npt.NDArray[np.int64], page_px: int, options: LabelOptions
) -> None:
    """Refuse labels that no tissue has.

    Args:
        path: of the labels.
        pages: pixels of membrane and of not membrane on each page, [N, 2].
        page_px: pixels of a page.
        options: how the values were understood.
    """
    membrane, other = pages.sum(axis=0)
    if membrane + other == 0:
        raise StackError(f"{path} has no annotated pixel: --ignore_label {options.ignore_label} leaves nothing over")
    if options.membrane_value is not None:
        return
    share = float(membrane / (membrane + other))
    if not 0 < share <= _MOST_MEMBRANE:
        if options.membrane_width > 0:
            raise StackError(
                f"{path} has {share:.0%} membrane between its ids, which no tissue has: check that it holds ids of "
                "cells; with --membrane_value ID, the id of what is no cell, it is taken as it is"
            )
        raise StackError(
            f"{path} has {share:.0%} membrane (value 0), which no tissue has: add --membrane_value with the value that "
            "means membrane, as 255 or 1; --membrane_value 0 takes the labels as they are"
        )
    for index, (dark, light) in enumerate(pages):
        # A page that is annotated in part may show one side alone.
        one_value = min(dark, light) == 0 and dark + light == page_px
        if one_value or dark > _MOST_MEMBRANE * (dark + light):
            raise StackError(
                f"page {index} of {path} has {dark / (dark + light):.0%} membrane where the whole stack has "
                f"{share:.0%}: draw that page again or leave it out; --membrane_value 0 takes the labels as they are"
            )
