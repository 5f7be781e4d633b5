"""The scores of the ISBI 2012 challenge, V_rand and V_info after border thinning, and two that need no segments.

Arganda-Carreras et al. (2015), "Crowdsourcing the creation of image segmentation algorithms for connectomics",
Frontiers in Neuroanatomy 9:142. Membrane is 0, everything else 1, in labels as in probabilities.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError
from unet.scores.agglomeration import agglomerate
from unet.volume import NOT_ANNOTATED

if TYPE_CHECKING:
    from collections.abc import Sequence

THRESHOLDS = tuple(step / 10 for step in range(11))


def dice(probability: npt.NDArray[Any], labels: npt.NDArray[Any], threshold: float = 0.5) -> float:
    """The Dice coefficient of the membrane: 2 |P and T| / (|P| + |T|).

    Args:
        probability: of "not membrane", any shape; membrane is where it is not above the threshold.
        labels: the same shape, 0 membrane, 1 not; 255 is not annotated and left out.
        threshold: between membrane and not.

    Returns:
        Between 0 and 1; 1 where neither has any membrane.
    """
    proposal, truth = (probability <= threshold) & (labels != NOT_ANNOTATED), labels == 0
    size = int(proposal.sum()) + int(truth.sum())
    return 2 * int((proposal & truth).sum()) / size if size else 1.0


def pixel_error(probability: npt.NDArray[Any], labels: npt.NDArray[Any], threshold: float = 0.5) -> float:
    """The share of annotated pixels on the wrong side of the threshold; 0 where none is annotated."""
    annotated = labels != NOT_ANNOTATED
    wrong = ((probability > threshold) != (labels != 0)) & annotated
    return int(wrong.sum()) / max(1, int(annotated.sum()))


def thinned_segments(proposal: npt.NDArray[np.bool_]) -> npt.NDArray[np.integer[Any]]:
    """Grow the 4-connected segments of a mask until lines of one pixel are left between them.

    Args:
        proposal: [H, W], True where not membrane.

    Returns:
        Segment numbers from 1 on, [H, W]; 0 on the lines, and everywhere if the mask is empty.
    """
    import scipy.ndimage

    return _thinned(scipy.ndimage.label(proposal)[0])


def _thinned(segments: npt.NDArray[Any]) -> npt.NDArray[np.integer[Any]]:
    from skimage.segmentation import watershed

    if not segments.any():
        return np.asarray(segments)
    return np.asarray(watershed((segments == 0).astype(np.uint8), segments, connectivity=1, watershed_line=True))


def v_rand_v_info(proposal: npt.NDArray[np.bool_], truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """V_rand thin and V_info thin of one slice.

    Args:
        proposal: [H, W], True where not membrane; it is thinned.
        truth: [H, W], True where not membrane; it is not thinned, and its membrane is left out of all counts.

    Returns:
        (V_rand, V_info), each 1 for the same segments. With one segment in each, V_info is 0 / 0, and 1 is returned.

    Raises:
        UnetError: if the truth has no foreground.
    """
    return _compared(thinned_segments(proposal), truth)


def _compared(thin: npt.NDArray[np.integer[Any]], truth: npt.NDArray[np.bool_]) -> tuple[float, float]:
    import scipy.ndimage
    import scipy.sparse

    objects, _ = scipy.ndimage.label(truth)
    inside = objects > 0
    pixels = int(inside.sum())
    if pixels == 0:
        raise UnetError("a label slice without any non-membrane pixel cannot be scored: leave it out")
    a = objects[inside]
    b = thin[inside]
    kept = b > 0
    # A line pixel inside true foreground is a segment of its own; u is their share.
    u = 1 - int(kept.sum()) / pixels
    ones, shape = np.ones(int(kept.sum()), np.int64), (int(a.max()) + 1, int(b.max()) + 1)
    joint = scipy.sparse.coo_array((ones, (a[kept], b[kept])), shape).tocsr().data / pixels
    of_truth = np.bincount(a)[1:] / pixels
    of_proposal = np.bincount(b[kept])[1:] / pixels
    together = float(np.sum(joint**2)) + u / pixels
    apart = 0.5 * (float(np.sum(of_truth**2)) + float(np.sum(of_proposal**2)) + u / pixels)
    singles = u * np.log(pixels)
    entropy_truth, entropy_proposal = _entropy(of_truth), _entropy(of_proposal) + singles
    mutual = entropy_truth + entropy_proposal - (_entropy(joint) + singles)
    information = entropy_truth + entropy_proposal
    return together / apart, float(2 * mutual / information) if information > 0 else 1.0


def _entropy(shares: npt.NDArray[np.float64]) -> float:
    positive = shares[shares > 0]
    return float(-np.sum(positive * np.log(positive)))


@dataclass(frozen=True)
class StackScores:
    """The scores of a stack.

    Attributes:
        thresholds: where the proposals were cut.
        v_rand: V_rand thin at each threshold, the mean over slices.
        v_info: V_info thin, likewise.
        dice: Dice coefficient of the membrane in the whole stack, cut at `threshold`.
        pixel_error: share of wrong pixels in the whole stack, cut at `threshold`.
        threshold: chosen before, on other slices; one of `thresholds`.
    """

    thresholds: tuple[float, ...]
    v_rand: tuple[float, ...]
    v_info: tuple[float, ...]
    dice: float
    pixel_error: float
    threshold: float = 0.5

    @property
    def v_rand_at_threshold(self) -> float:
        """V_rand thin at `threshold`."""
        return self.v_rand[self.thresholds.index(self.threshold)]

    @property
    def v_info_at_threshold(self) -> float:
        """V_info thin at `threshold`."""
        return self.v_info[self.thresholds.index(self.threshold)]

    @property
    def best_v_rand(self) -> float:
        """V_rand thin at its best threshold."""
        return max(self.v_rand)

    @property
    def best_v_rand_threshold(self) -> float:
        """The threshold of `best_v_rand`."""
        return self.thresholds[self.v_rand.index(self.best_v_rand)]

    @property
    def best_v_info(self) -> float:
        """V_info thin at its best threshold."""
        return max(self.v_info)

    @property
    def best_v_info_threshold(self) -> float:
        """The threshold of `best_v_info`."""
        return self.thresholds[self.v_info.index(self.best_v_info)]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        best = ("best_v_rand", "best_v_rand_threshold", "best_v_info", "best_v_info_threshold")
        names = ("v_rand_at_threshold", "v_info_at_threshold", *best)
        return {**asdict(self), **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        return (
            f"at the threshold {self.threshold:g}: V_rand thin {self.v_rand_at_threshold:.4f}, V_info thin "
            f"{self.v_info_at_threshold:.4f}, Dice of the membrane {self.dice:.4f}, pixel error "
            f"{self.pixel_error:.4f}; "
            "the challenge's figures, each at the threshold that is best on these very slices: V_rand thin "
            f"{self.best_v_rand:.4f} (at {self.best_v_rand_threshold:g}), V_info thin {self.best_v_info:.4f} (at "
            f"{self.best_v_info_threshold:g})"
        )


def _score_slice(task: tuple[npt.NDArray[Any], npt.NDArray[Any], tuple[float, ...]]) -> list[tuple[float, float]]:
    probability, label, thresholds = task
    found: dict[bytes, tuple[float, float]] = {}
    scores = []
    for threshold in thresholds:
        # What nobody annotated separates in the proposal as it does in the label.
        mask = (probability > threshold) & (label != NOT_ANNOTATED)
        # A mask, or a network that is sure everywhere, gives the same proposal at many thresholds.
        key = np.packbits(mask).tobytes()
        if key not in found:
            found[key] = v_rand_v_info(mask, (label != 0) & (label != NOT_ANNOTATED))
        scores.append(found[key])
    return scores


def score_stack(
    probability: npt.NDArray[Any],
    labels: npt.NDArray[Any],
    thresholds: Sequence[float] = THRESHOLDS,
    jobs: int = 1,
    threshold: float = 0.5,
) -> StackScores:
    """Score a stack as the challenge does.

    Args:
        probability: of "not membrane", [N, H, W] in [0, 1].
        labels: [N, H, W], 0 membrane, 1 not; pixels of 255 are not annotated and left out of all counts.
        thresholds: where proposals are cut.
        jobs: processes that share the slices. They start in a second, as new processes: a fork of a process with
            TensorFlow's threads may hang.
        threshold: chosen before, on other slices; where proposals are cut for the scores of pixels, too.

    Raises:
        UnetError: if the shapes differ, there are no slices, or a value is not a number in [0, 1].
    """
    if probability.shape != labels.shape or probability.ndim != 3 or len(probability) == 0:
        raise UnetError(f"a proposal of {probability.shape} cannot be scored against labels of {labels.shape}")
    if not (np.isfinite(probability).all() and probability.min() >= 0 and probability.max() <= 1):
        raise UnetError("the proposal has values outside 0 to 1: it must be the probability of not being membrane")
    cuts = tuple(sorted({*map(float, thresholds), float(threshold)}))
    tasks = [(proposal, label, cuts) for proposal, label in zip(probability, labels)]
    if jobs > 1:
        # Not known where the client runs without Linux.
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        with ProcessPoolExecutor(min(jobs, len(tasks)), multiprocessing.get_context("spawn")) as pool:
            scores = np.array(list(pool.map(_score_slice, tasks)))
    else:
        scores = np.array([_score_slice(task) for task in tasks])
    means = scores.mean(axis=0)
    return StackScores(
        cuts,
        tuple(float(value) for value in means[:, 0]),
        tuple(float(value) for value in means[:, 1]),
        dice(probability, labels, threshold),
        pixel_error(probability, labels, threshold),
        float(threshold),
    )


def score_agglomerated(
    probability: npt.NDArray[Any], labels: npt.NDArray[Any], threshold: float, merge_below: float
) -> tuple[float, float]:
    """V_rand thin and V_info thin of agglomerated cells, the means over the slices of a stack.

    Args:
        probability: of "not membrane", [n, H, W].
        labels: 0 membrane, 1 not, 255 not annotated, [n, H, W].
        threshold: chosen before, on other slices.
        merge_below: see `unet.scores.agglomeration.agglomerate`.

    Raises:
        UnetError: if a label slice has no foreground.
    """
    scores = []
    for found, label in zip(probability, labels):
        annotated = label != NOT_ANNOTATED
        # What nobody annotated separates in the proposal as it does in the label.
        cells, _ = agglomerate(np.where(annotated, found, 0), threshold, merge_below)
        scores.append(_compared(_thinned(cells), (label != 0) & annotated))
    v_rand, v_info = np.mean(scores, axis=0)
    return float(v_rand), float(v_info)
