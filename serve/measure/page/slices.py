"""What the report shows of each slice: pictures that the page draws the threshold on, scores, merges and splits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.measure.common import MeasureError
from unet.intensity import find_windows
from unet.page import picture
from unet.scores import StackScores, dice, pixel_error, score_stack
from unet.scores.truth import merges_and_splits, true_segments
from unet.volume import PROBABILITY_LIMITS, open_volume, page_range
from unet.volume.overlay import shrink, shrink_factor

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

THRESHOLDS = tuple(step / 10 for step in range(11))
# Merges and splits are marked at these; the page takes the nearest.
MARKED = tuple(step / 20 for step in range(21))


def slices_of(images: Path, probabilities: Path, pages: str = ":") -> Iterator[tuple[int, dict[str, Any], Any]]:
    """Each slice's number, its pictures by name, and its probability, float [H, W] in [0, 1].

    Args:
        images: the stack that was segmented.
        probabilities: what the client wrote of it.
        pages: which slices, as FIRST:LAST.

    Raises:
        StackError: if either cannot be read, or has no such slices.
        MeasureError: if they do not fit each other.
    """
    with open_volume(images) as volume, open_volume(probabilities, PROBABILITY_LIMITS) as found:
        if (len(volume), volume.height, volume.width) != (len(found), found.height, found.width):
            raise MeasureError(f"{probabilities} is not of {images}: segment it again")
        scale = 1.0 if found.dtype.kind == "f" else float(np.iinfo(found.dtype).max)
        windows = find_windows(volume)
        for page in page_range(pages, len(found)):
            image, whole = windows.apply(page, volume[page]), found[page] / np.float32(scale)
            image, probability = shrink(image, whole, shrink_factor(*image.shape))
            grey = np.asarray(np.rint(probability * 255), np.uint8)
            yield page, {"input": picture(image, "JPEG"), "probability": picture(grey, "PNG")}, whole


def truth_of(probability: npt.NDArray[Any], labels: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """A slice's true segments as a picture, and which of them are merged and split at each of `MARKED`.

    Args:
        probability: of "not membrane", [H, W].
        labels: of the same shape, as `read_labels` gives them.
    """
    segments = true_segments(labels)
    factor = shrink_factor(*segments.shape)
    small = segments[::factor, ::factor]
    # A number in three bytes, as red, green and blue.
    coloured = np.stack([(small >> shift & 0xFF).astype(np.uint8) for shift in (0, 8, 16)], axis=-1)
    marks = [merges_and_splits(probability > threshold, segments) for threshold in MARKED]
    return {
        "truth": picture(coloured, "PNG"),
        "merged": [merged for merged, _ in marks],
        "split": [split for _, split in marks],
    }


def stack_scores(
    probability: npt.NDArray[Any], labels: npt.NDArray[np.uint8], threshold: float
) -> tuple[list[StackScores], StackScores]:
    """The scores of each slice, and of the stack, which are their means.

    Args:
        probability: of "not membrane", [N, H, W].
        labels: of the same shape.
        threshold: chosen before, on other slices.
    """
    pairs = zip(probability, labels)
    each = [score_stack(one[np.newaxis], label[np.newaxis], THRESHOLDS, threshold=threshold) for one, label in pairs]
    means = {
        name: tuple(float(value) for value in np.mean([getattr(one, name) for one in each], axis=0))
        for name in ("v_rand", "v_info")
    }
    errors = dice(probability, labels, threshold), pixel_error(probability, labels, threshold)
    return each, StackScores(each[0].thresholds, means["v_rand"], means["v_info"], *errors, threshold)
