"""A sign of life of long work on slices."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from unet.errors import say

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_Item = TypeVar("_Item")
_LINE_EVERY_S = 10.0


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all ranks; known before TensorFlow and Horovod are loaded."""
    return os.environ.get("HOROVOD_RANK", "0") == "0"


def watched(items: Sequence[_Item], what: str, *, passing: bool = False) -> Iterator[_Item]:
    """The items, one after another: of the first rank a bar on a terminal, and elsewhere a line every ten seconds.

    Args:
        items: the work.
        what: is done with them, as in "3 of 7 ...".
        passing: whether the bar goes when they are done, for work within other work.
    """
    first = is_first_rank()
    with tqdm(items, unit="slice", disable=None if first else True, leave=not passing) as bar:
        said = time.monotonic()
        for done, item in enumerate(bar):
            if first and bar.disable and time.monotonic() - said >= _LINE_EVERY_S:
                say(f"{done} of {len(items)} {what}")
                said = time.monotonic()
            yield item
