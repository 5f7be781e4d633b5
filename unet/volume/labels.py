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

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        values: set[int] = set() if options.membrane_value is None else {options.membrane_value}
        for index, page in enumerate(reader):
            if options.membrane_width > 0:
                labels[index] = labels_of_ids(page, options)
                continue
            values.update(int(value) for value in np.unique(page) if int(value) != options.ignore_label)
            if len(values | {0} if options.membrane_value is None else values) > 2:
                raise StackError(_too_many(path, index, values, options))
            labels[index] = _labels_of_mask(page, options)
    _check_share(path, labels, options)
    return labels


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


def _check_share(path: str | os.PathLike[str], labels: npt.NDArray[np.uint8], options: LabelOptions) -> None:
    annotated = int(np.count_nonzero(labels != NOT_ANNOTATED))
    if annotated == 0:
        raise StackError(f"{path} has no annotated pixel: --ignore_label {options.ignore_label} leaves nothing over")
    share = int(np.count_nonzero(labels == MEMBRANE)) / annotated
    if options.membrane_value is not None or 0 < share <= _MOST_MEMBRANE:
        return
    if options.membrane_width > 0:
        raise StackError(
            f"{path} has {share:.0%} membrane between its ids, which no tissue has: check that it holds ids of cells; "
            "with --membrane_value ID, the id of what is no cell, it is taken as it is"
        )
    raise StackError(
        f"{path} has {share:.0%} membrane (value 0), which no tissue has: add --membrane_value with the value that "
        "means membrane, as 255 or 1; --membrane_value 0 takes the labels as they are"
    )
