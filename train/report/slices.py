"""Scores of single slices, and pictures of the cells that a network merges and splits in them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from train.run.progress import watched
from train.scoring import Tally, tally
from unet.page import picture
from unet.scores import thinned_segments
from unet.scores.truth import merges_and_splits, true_segments
from unet.volume import NOT_ANNOTATED
from unet.volume.overlay import shrink_factor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from train.evaluation import Predictor
    from train.input.store import Slice

# Colours of the report of served slices, which people with any colour vision tell apart.
MERGED, SPLIT, BOTH, LINE = (213, 94, 0), (0, 114, 178), (142, 68, 173), (255, 255, 255)
_OPACITY = 0.5
# So many slices are pictured.
PICTURED = 4


@dataclass
class Marks:
    """How many true cells a slice's proposal merges and splits, and where.

    Attributes:
        threshold: where the probability is cut.
        merged: true cells that are joined with others.
        split: true cells that are cut.
        picture: of the slice as a data address; of a large slice, of its block with the most of both.
    """

    threshold: float
    merged: int = 0
    split: int = 0
    picture: str = ""
    _most: int = -1

    def add(
        self, image: npt.NDArray[np.uint8], label: npt.NDArray[np.uint8], probability: npt.NDArray[np.float32]
    ) -> None:
        """Count and draw what is annotated of a block, all [H, W]."""
        annotated = label != NOT_ANNOTATED
        rows = np.flatnonzero(annotated.any(axis=1))
        kept = slice(rows[0], rows[-1] + 1)
        proposal, truth = (probability > self.threshold) & annotated, true_segments(label)
        merged, split = merges_and_splits(proposal, truth)
        self.merged += len(merged)
        self.split += len(split)
        if len(merged) + len(split) > self._most:
            self._most = len(merged) + len(split)
            drawn = draw(image[kept], truth[kept], proposal[kept], merged, split)
            self.picture = picture(_smaller(drawn), "JPEG")


def draw(
    image: npt.NDArray[np.uint8],
    truth: npt.NDArray[np.integer[Any]],
    proposal: npt.NDArray[np.bool_],
    merged: list[int],
    split: list[int],
) -> npt.NDArray[np.uint8]:
    """The slice in grey, its merged and split true cells in colour, and lines where the proposal separates.

    Args:
        image: [H, W].
        truth: numbers of true segments, [H, W].
        proposal: [H, W], True where not membrane.
        merged: numbers of the true segments that are joined with others.
        split: numbers of those that are cut.

    Returns:
        uint8 [H, W, 3].
    """
    drawn = np.repeat(image[..., np.newaxis], 3, axis=-1)
    both = set(merged) & set(split)
    for colour, cells in ((MERGED, set(merged) - both), (SPLIT, set(split) - both), (BOTH, both)):
        inside = np.isin(truth, sorted(cells))
        drawn[inside] = np.rint(drawn[inside] * (1 - _OPACITY) + np.array(colour) * _OPACITY)
    drawn[thinned_segments(proposal) == 0] = LINE
    return drawn


def _smaller(drawn: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A picture whose sides a page can show; the lines stay, paler."""
    from PIL import Image

    return np.asarray(Image.fromarray(drawn).reduce(shrink_factor(*drawn.shape[:2])))


@dataclass(frozen=True)
class Scored:
    """One slice's scores at the run's threshold.

    Attributes:
        name: of the slice.
        scores: v_rand, v_info, dice and pixel_error.
        order: what slices are ordered by; the worst has the least.
        marks: its merges and splits.
        sums: what the scores were made of.
    """

    name: str
    scores: dict[str, float]
    order: float
    marks: Marks
    sums: npt.NDArray[np.float64] = field(repr=False)


def score_slices(predict: Predictor, slices: Sequence[Slice], threshold: float, prefix: str = "") -> list[Scored]:
    """Score slices one by one; the worst come first, and only the worst `PICTURED` keep their pictures.

    Args:
        predict: the network.
        slices: labelled ones.
        threshold: where the network's probability is cut.
        prefix: of the slices' names.

    Raises:
        TrainError: if the network's answer is not a number.
    """
    found: list[Scored] = []
    for item in watched(slices, "slices scored"):
        marks = Marks(threshold)
        scores = tally(predict, [item], look=marks.add)
        found.append(Scored(prefix + item.name, scores.at(threshold), scores.order(threshold), marks, scores.sums))
        found = worst_first(found)
    return found


def worst_first(found: Iterable[Scored]) -> list[Scored]:
    """The slices in order, with the pictures of the worst alone."""
    ordered = sorted(found, key=lambda one: one.order)
    better = [replace(one, marks=replace(one.marks, picture="")) for one in ordered[PICTURED:]]
    return [*ordered[:PICTURED], *better]


def together(found: Iterable[Scored], threshold: float) -> dict[str, float]:
    """The scores of one run's slices together, at its threshold."""
    return Tally(np.sum([one.sums for one in found], axis=0)).at(threshold)
