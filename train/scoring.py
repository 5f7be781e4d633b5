"""Scores of the network on labelled slices, summed slice by slice, so that ranks can share them out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from train.run.progress import watched
from unet.geometry import GRID, HALO
from unet.scores import THRESHOLDS, v_rand_v_info
from unet.volume import NOT_ANNOTATED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from train.evaluation import Predictor
    from train.input.store import Slice

Floats = npt.NDArray[np.float64]

# A larger slice is scored in blocks: its segments and its probability would need gigabytes. One of 4096 needs one more.
_BLOCK_PX = 2048
# Around a block, a multiple of the pooling grid that covers the halo.
_AROUND_PX = -(-HALO // GRID) * GRID
# What of the training slices chooses a threshold: so many of them, and of each a corner of at most this side.
_CHOOSING, _CHOOSING_PX = 4, 1024
# So many pixels are scored at each validation, and of a larger slice a square of this side: ten validations of a large
# stack would take longer than its training.
_VALIDATED_PX, _VALIDATED_SIDE_PX = 2**21, 1024
# How far the neighbours of a threshold reach, and which difference of V_rand + V_info tells nothing.
_NEAR, _AS_GOOD = 0.2, 0.02
# The columns of a tally; all but the first are one value for each threshold.
_SCORED, _V_RAND, _V_INFO, _BOTH, _PROPOSED, _TRUE, _WRONG, _ANNOTATED = range(8)


@dataclass(frozen=True)
class Tally:
    """Sums over slices at each threshold; the sum of two tallies is the tally of all their slices.

    Attributes:
        sums: float64 [8, thresholds]: slices (or blocks) with cells, their V_rand and V_info, then pixels: membrane in
            both, in the proposal and in the label, on the wrong side, and annotated.
        thresholds: where the proposals were cut.
    """

    sums: Floats
    thresholds: tuple[float, ...] = THRESHOLDS

    @property
    def v_rand(self) -> Floats:
        """V_rand thin at each threshold, the mean over slices; NaN if no slice has cells."""
        return self._mean(_V_RAND)

    @property
    def v_info(self) -> Floats:
        """V_info thin at each threshold, the mean over slices; NaN if no slice has cells."""
        return self._mean(_V_INFO)

    @property
    def dice(self) -> Floats:
        """The Dice coefficient of the membrane at each threshold; 1 where neither has any."""
        size = self.sums[_PROPOSED] + self.sums[_TRUE]
        return np.where(size > 0, 2 * self.sums[_BOTH] / np.maximum(size, 1), 1.0)

    @property
    def pixel_error(self) -> Floats:
        """The share of annotated pixels on the wrong side of each threshold."""
        return np.asarray(self.sums[_WRONG] / np.maximum(self.sums[_ANNOTATED], 1))

    def _mean(self, row: int) -> Floats:
        with np.errstate(invalid="ignore"):
            return np.asarray(self.sums[row] / self.sums[_SCORED])

    @property
    def is_blank(self) -> bool:
        """Whether each threshold between 0 and 1 makes membrane of all pixels or of none: the network sees nothing."""
        inner = [0 < threshold < 1 for threshold in self.thresholds]
        proposed = self.sums[_PROPOSED][inner]
        return bool(np.isin(proposed, (0, self.sums[_ANNOTATED][0])).all())

    @property
    def best_threshold(self) -> float:
        """The threshold between 0 and 1 that suits other slices like these, and of several the nearest to one half.

        Of those whose V_rand + V_info is within 0.02 of the largest it is the one where V_rand + V_info, averaged over
        the thresholds up to 0.2 away, less the pixel error, is largest. On few slices one cell that a gap in a membrane
        joins to another makes the scores jump, so that the best single threshold is best by chance, and a flat curve
        ends in a membrane far too thick.
        """
        inner = [cut for cut in range(len(self.thresholds)) if 0 < self.thresholds[cut] < 1]
        cuts = np.array([self.thresholds[cut] for cut in inner])
        total = (self.v_rand + self.v_info)[inner]
        if np.isfinite(total).all():
            near = np.abs(cuts[:, np.newaxis] - cuts) <= _NEAR + 1e-9
            merit = near @ total / near.sum(axis=1) - self.pixel_error[inner]
            merit[total < total.max() - _AS_GOOD] = -np.inf
        else:  # no cells to tell apart: what the membrane's Dice says
            merit = self.dice[inner]
        best = [float(cut) for cut in cuts[merit >= merit.max() - 1e-9]]
        return min(best, key=lambda threshold: abs(threshold - 0.5))

    @property
    def highest(self) -> float:
        """The largest V_rand + V_info at any threshold, or twice the largest Dice: by it networks are compared."""
        return max(self.order(threshold) for threshold in self.thresholds if 0 < threshold < 1)

    def at(self, threshold: float) -> dict[str, float]:
        """The scores at one of the thresholds, by name."""
        cut = self.thresholds.index(threshold)
        names = ("v_rand", "v_info", "dice", "pixel_error")
        return {name: float(getattr(self, name)[cut]) for name in names}

    def order(self, threshold: float) -> float:
        """What slices are ordered by: V_rand + V_info, or twice the Dice where no slice has cells."""
        at = self.at(threshold)
        total = at["v_rand"] + at["v_info"]
        return total if np.isfinite(total) else 2 * at["dice"]

    def as_dict(self, threshold: float) -> dict[str, Any]:
        """Everything, for JSON: the scores at ``threshold``, and the challenge's own, each at its best threshold."""
        at = self.at(threshold)
        record: dict[str, Any] = {
            "threshold": threshold,
            "v_rand_at_threshold": at["v_rand"],
            "v_info_at_threshold": at["v_info"],
            "dice": at["dice"],
            "pixel_error": at["pixel_error"],
        }
        for name in ("v_rand", "v_info"):
            values = getattr(self, name)
            record[f"best_{name}"] = float(values.max())
            record[f"best_{name}_threshold"] = self.thresholds[int(values.argmax())]
            record[name] = [float(value) for value in values]
        return {**record, "thresholds": list(self.thresholds)}


def tally(
    predict: Predictor,
    slices: Iterable[Slice],
    thresholds: Sequence[float] = THRESHOLDS,
    look: Callable[[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.float32]], None] | None = None,
) -> Tally:
    """Score the network on slices, one after another; pixels that are not annotated count nowhere.

    Args:
        predict: the network.
        slices: labelled ones.
        thresholds: where its probability is cut.
        look: is shown the image, label and probability of each slice, or of each block of a large one.

    Raises:
        TrainError: if the network's answer is not a number.
    """
    sums = np.zeros((8, len(thresholds)))
    for item in slices:
        for image, label, inner in _blocks(item):
            probability = predict(image)[inner]
            sums += _score(probability, label, thresholds)
            if look is not None:
                look(image[inner], label, probability)
        item.release()
    return Tally(sums, tuple(float(cut) for cut in thresholds))


def sample(slices: Sequence[Slice]) -> list[Slice]:
    """What of the validation slices is scored: all of them, or of many pixels a part, 2^21 pixels at most.

    The part is of slices spread evenly over all, and of each that is larger than 1,024 x 1,024 pixels such a square:
    the one with most annotated pixels, and of several the nearest to the middle.
    """
    if sum(item.label.size for item in slices) <= _VALIDATED_PX:
        return list(slices)
    largest = max(min(item.label.size, _VALIDATED_SIDE_PX**2) for item in slices)
    count = min(len(slices), max(1, _VALIDATED_PX // largest))
    return [_square(slices[(2 * place + 1) * len(slices) // (2 * count)]) for place in range(count)]


def _square(item: Slice) -> Slice:
    height, width = item.label.shape
    side = _VALIDATED_SIDE_PX
    if height <= side and width <= side:
        return item

    def merit(square: tuple[range, range]) -> tuple[int, int]:
        rows, cols = square
        label = item.label[rows.start : rows.stop, cols.start : cols.stop]
        from_middle = abs(rows.start + rows.stop - height) + abs(cols.start + cols.stop - width)
        return np.count_nonzero(label != NOT_ANNOTATED), -from_middle

    rows, cols = max(((rows, cols) for rows in _spans(height, side) for cols in _spans(width, side)), key=merit)
    item.release()
    return item.part(rows, cols)


def _spans(length: int, side: int) -> list[range]:
    """Spans of a length of at most so many pixels each, side by side, the last one up to its end."""
    return [range(max(0, min(start, length - side)), min(start + side, length)) for start in range(0, length, side)]


def training_scores(predict: Predictor, training: Sequence[Slice]) -> Tally:
    """The scores of a few of the slices that were trained on, for a run that kept none for validation.

    Their best threshold is the run's. A network is surer of what it has seen, so a validation part chooses better; but
    one half, which has nothing to do with how the loss weighs the membrane, is often far off.

    Raises:
        TrainError: if the network's answer is not a number.
    """
    count = min(_CHOOSING, len(training))
    corner = (slice(_CHOOSING_PX), slice(_CHOOSING_PX))
    chosen = [training[len(training) * part // count] for part in range(count)]
    corners = [replace(item, image=item.image[corner], label=item.label[corner]) for item in chosen]
    return tally(predict, watched(corners, "training slices scored", passing=True))


def _blocks(item: Slice) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any], tuple[slice, slice]]]:
    """What to predict, the label to compare with, and where that lies in the prediction."""
    height, width = item.label.shape
    for row in range(0, height, _BLOCK_PX):
        for col in range(0, width, _BLOCK_PX):
            top, left = max(0, row - _AROUND_PX), max(0, col - _AROUND_PX)
            label = np.asarray(item.label[row : row + _BLOCK_PX, col : col + _BLOCK_PX])
            if (label == NOT_ANNOTATED).all():
                continue
            image = item.image[top : row + _BLOCK_PX + _AROUND_PX, left : col + _BLOCK_PX + _AROUND_PX]
            rows, cols = slice(row - top, row - top + len(label)), slice(col - left, col - left + label.shape[1])
            yield np.ascontiguousarray(image), label, (rows, cols)


def _score(probability: npt.NDArray[np.float32], label: npt.NDArray[np.uint8], thresholds: Sequence[float]) -> Floats:
    annotated = label != NOT_ANNOTATED
    membrane, cells = label == 0, (label != 0) & annotated
    sums = np.zeros((8, len(thresholds)))
    found: dict[bytes, tuple[float, float]] = {}
    for cut, threshold in enumerate(thresholds):
        # What nobody annotated separates: whatever the network says there joins no segments.
        mask = (probability > threshold) & annotated
        proposed = annotated & ~mask
        sums[_BOTH:, cut] = (
            np.count_nonzero(proposed & membrane),
            np.count_nonzero(proposed),
            np.count_nonzero(membrane),
            np.count_nonzero(mask != cells),
            np.count_nonzero(annotated),
        )
        if not cells.any():
            continue
        # A sure network gives the same proposal at many thresholds.
        key = np.packbits(mask).tobytes()
        if key not in found:
            found[key] = v_rand_v_info(mask, cells)
        sums[_SCORED, cut] = 1
        sums[_V_RAND : _V_INFO + 1, cut] = found[key]
    return sums
