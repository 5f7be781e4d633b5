"""A step's output beside its parent's, and the refusal where they differ by more than the step may."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ParityError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Tolerance:
    """What one kind of step may change.

    Attributes:
        quantity: "probability", or "logits", whose differences are relative to the largest absolute logit.
        max_difference: of any pixel.
        flipped_share: share of pixels that change sides; one pixel always may, as in a small tile.
        reason: why these figures.
        score_ratio: share of V_rand and V_info that must stay.
    """

    quantity: str
    max_difference: float
    flipped_share: float
    reason: str
    score_ratio: float = 0.9999


LOGITS = Tolerance("logits", 1e-5, 1e-5, "float32 on both sides: only the order of summation differs")
SAME_TYPE = Tolerance(
    "probability", 5e-4, 1e-5, "equal logits may still round to neighbouring float16 numbers, at most 2^-11 apart"
)
HALF_WEIGHTS = Tolerance(
    "probability", 5e-3, 1e-3, "weights of 11 significant bits through 19 3x3 convolutions, summed in float32", 0.999
)
HALF_ARITHMETIC = Tolerance(
    "probability", 1e-2, 1e-3, "11 significant bits for each activation too: twice the tolerance of weights", 0.995
)
BFLOAT = Tolerance(
    "probability", 4e-2, 8e-3, "8 significant bits, three fewer than float16: eight times that of its weights", 0.995
)
# Eight-bit steps move single pixels far; what counts is that the cells stay. Nobody who has not asked for it pays for
# the speed with more than a thousandth of the scores.
INTEGER = Tolerance(
    "probability", 0.5, 2e-2, "8-bit weights and activations; the scores of held-out slices decide", 0.999
)
INTEGER_ASKED_FOR = replace(INTEGER, score_ratio=0.995)


@dataclass(frozen=True)
class Comparison:
    """One step measured against another on the same tiles.

    Attributes:
        step: what was measured.
        against: what it was measured against.
        tolerance: what the step may change.
        max_difference: largest absolute difference of a pixel, in the tolerance's units.
        mean_difference: mean absolute difference.
        flipped_share: share of pixels that change sides.
        worst_tile: number of the tile with the largest difference of a pixel.
        tiles: number of tiles.
        pixels: number of their pixels.
    """

    step: str
    against: str
    tolerance: Tolerance
    max_difference: float
    mean_difference: float
    flipped_share: float
    worst_tile: int
    tiles: int
    pixels: int

    @property
    def accepted(self) -> bool:
        """Whether the step changes no more than it may."""
        return self.fault is None

    @property
    def fault(self) -> str | None:
        """What is beyond the tolerance, with both figures; None where nothing is."""
        allowed = self.tolerance
        if not self.max_difference <= allowed.max_difference:
            what = "probabilities" if allowed.quantity == "probability" else "logits, relative to the largest,"
            return f"its {what} differ by {self.max_difference:.2e}, {allowed.max_difference:.0e} is the most accepted"
        if not self.flipped_share <= max(allowed.flipped_share, 1 / self.pixels):
            return (
                f"a share of {self.flipped_share:.2e} of its pixels changes sides, "
                f"{allowed.flipped_share:.0e} is the most accepted"
            )
        return None

    def check(self) -> Comparison:
        """Itself, where accepted.

        Raises:
            ParityError: naming step, figure and tolerance.
        """
        if self.fault is not None:
            raise ParityError(f"{self.step} does not agree with {self.against}: {self.fault}")
        return self

    def as_dict(self) -> dict[str, Any]:
        """The comparison as the card keeps it."""
        return {
            "step": self.step,
            "against": self.against,
            "quantity": self.tolerance.quantity,
            "max_difference": self.max_difference,
            "max_accepted": self.tolerance.max_difference,
            "mean_difference": self.mean_difference,
            "flipped_share": self.flipped_share,
            "flipped_accepted": self.tolerance.flipped_share,
            "worst_tile": self.worst_tile,
            "tiles": self.tiles,
            "accepted": self.accepted,
            "reason": self.tolerance.reason,
        }

    def __str__(self) -> str:
        return (
            f"{self.step} against {self.against}: {self.tolerance.quantity} within {self.max_difference:.1e} "
            f"(accepted: {self.tolerance.max_difference:.0e}), {self.flipped_share:.1e} of the pixels flipped"
        )


def compare(
    step: str,
    against: str,
    found: Iterable[NDArray[Any]],
    expected: Iterable[NDArray[Any]],
    tolerance: Tolerance,
) -> Comparison:
    """Measure a step's outputs against another's, batch by batch.

    Args:
        step: name of what is measured.
        against: name of what it is measured against.
        found: its outputs, [N, C, H, W] each.
        expected: the other's, of the same shapes; probability of one plane or logits of two.
        tolerance: what to judge by.

    Returns:
        The comparison, not yet checked: see ``Comparison.check``.

    Raises:
        ParityError: an output has another shape, or holds NaN or an infinity, on either side.
    """
    pairs = list(_pairs(step, against, found, expected))
    largest = max(float(np.abs(b).max()) for _, b in pairs) if tolerance.quantity == "logits" else 1.0
    scale = largest or 1.0
    per_tile = np.concatenate([np.abs(a - b).max(axis=(1, 2, 3)) for a, b in pairs]) / scale
    values = sum(b.size for _, b in pairs)
    flips = sum(int(np.count_nonzero(_side(a) != _side(b))) for a, b in pairs)
    pixels = sum(_side(b).size for _, b in pairs)
    return Comparison(
        step=step,
        against=against,
        tolerance=tolerance,
        max_difference=float(per_tile.max()),
        mean_difference=float(sum(np.abs(a - b).sum() for a, b in pairs)) / values / scale,
        flipped_share=flips / pixels,
        worst_tile=int(per_tile.argmax()),
        tiles=len(per_tile),
        pixels=pixels,
    )


def worst(step: str, comparisons: Sequence[Comparison]) -> Comparison:
    """Several comparisons of one kind as one, with the worst of each figure.

    Args:
        step: what to call it.
        comparisons: at least one.
    """
    largest = max(comparisons, key=lambda one: one.max_difference)
    return dataclasses.replace(
        largest,
        step=step,
        mean_difference=max(one.mean_difference for one in comparisons),
        flipped_share=max(one.flipped_share for one in comparisons),
    )


def check_order(step: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Refuse answers that are not each nearest to what is due of its own tile: however alike, none is another's.

    Args:
        step: what gave them.
        found: answers to the tiles of a batch, [N, 1, H, W].
        expected: what is due, of the same shape; the same for two tiles only where nothing can be told.

    Raises:
        ParityError: naming both tiles.
    """
    answers, due = (values.reshape(len(values), -1).astype(np.float32) for values in (found, expected))
    for tile, answer in enumerate(answers):
        distances = np.abs(due - answer).mean(axis=1)
        nearest = int(distances.argmin())
        if distances[nearest] < distances[tile]:
            raise ParityError(f"{step} answers tile {tile} with what is due of tile {nearest}: answers are swapped")


def _pairs(
    step: str, against: str, found: Iterable[NDArray[Any]], expected: Iterable[NDArray[Any]]
) -> Iterable[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    lists = list(found), list(expected)
    if not lists[1] or [a.shape for a in lists[0]] != [b.shape for b in lists[1]]:
        shapes = [[list(a.shape) for a in side] for side in lists]
        raise ParityError(f"{step} gives the shapes {shapes[0]} where {against} gives {shapes[1]}")
    for batch in zip(*lists):
        for name, values in zip((step, against), batch):
            bad = int(values.size - np.count_nonzero(np.isfinite(values)))
            if bad:
                raise ParityError(f"{name} gives {bad} values that are NaN or infinite, none is accepted")
        yield batch[0].astype(np.float64), batch[1].astype(np.float64)


def _side(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which pixels are "not membrane"."""
    decided: NDArray[np.bool_] = values[:, 1] > values[:, 0] if values.shape[1] == 2 else values[:, 0] > 0.5
    return decided
