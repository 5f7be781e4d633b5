"""What a volume may declare to be read, whatever its format, and the error of one that cannot be."""

from __future__ import annotations

from dataclasses import dataclass

from unet.errors import UnetError
from unet.intensity import DTYPES as INTENSITY_DTYPES


class StackError(UnetError):
    """A stack that cannot be read, or that is not what the task needs."""


@dataclass(frozen=True)
class Limits:
    """What a file may declare.

    Attributes:
        max_pages: slices in a stack.
        max_pixels_per_page: rows x columns of a slice; 2**32 admits 64k x 64k.
        max_pixels_at_once: of them that can only be decoded together, or are asked for as a whole slice.
        dtypes: pixel formats.
        finite: refuse floating-point slices with values that are no finite numbers, once they are read.
        usual: data sets that are meant in a file with several.
        in_colour: what is said of slices in colour.
    """

    max_pages: int = 100_000
    max_pixels_per_page: int = 2**32
    max_pixels_at_once: int = 2**30
    dtypes: tuple[str, ...] = INTENSITY_DTYPES
    finite: bool = False
    usual: tuple[str, ...] = ("volumes/raw",)
    in_colour: str = "is a colour image: convert the stack to 8- or 16-bit grey"


IMAGE_LIMITS = Limits()
PROBABILITY_LIMITS = Limits(dtypes=("float32", "uint8", "uint16"), finite=True)
LABEL_LIMITS = Limits(
    dtypes=("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    usual=("volumes/labels/neuron_ids",),
    in_colour="is a colour image, and RGB masks of one colour each are not read: save the labels in grey, as a mask "
    "(membrane 0, other pixels 255) or as ids of cells (with --membrane_width)",
)


def page_range(text: str, count: int) -> range:
    """The slices that a flag's FIRST:LAST means, LAST left out; either may be left away.

    Args:
        text: what the user wrote.
        count: slices of the stack.

    Raises:
        StackError: if it is something else, or outside the stack.
    """
    first, colon, last = text.partition(":")
    try:
        chosen = range(int(first or 0), int(last or count))
    except ValueError:
        colon = ""
    if not colon:
        raise StackError(f"--pages {text} is not FIRST:LAST, as in 24:30")
    if not 0 <= chosen.start < chosen.stop <= count:
        raise StackError(f"--pages {text} is outside the stack's 0:{count}")
    return chosen
