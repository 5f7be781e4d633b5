"""A sign of life of long work on slices."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from train.run.launcher import is_first_rank
from unet.errors import say
from unet.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_Item = TypeVar("_Item")


def progress(total: int | None, what: str, *, unit: str = "slice", passing: bool = False) -> Progress:
    """A `unet.progress.Progress` of slices that the first rank alone shows, beside the other lines of a run.

    Args:
        total: slices; None where nobody knows how many there will be.
        what: is done with them, as in "3 of 7 ...".
        unit: the name of one part, where it is no slice.
        passing: whether the bar goes when they are done, for work within other work.
    """
    return Progress(total, what, say, unit=unit, quiet=not is_first_rank(), passing=passing)


def watched(items: Sequence[_Item], what: str, *, passing: bool = False) -> Iterator[_Item]:
    """The items, one after another, with a `progress` of what is done with them."""
    return progress(len(items), what, passing=passing).over(items)
