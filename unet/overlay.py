"""A picture of one slice with its membrane drawn over it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.files import atomic_file

MEMBRANE_COLOUR = (255, 64, 32)
GAP_PX = 8


def membrane_overlay(
    image: npt.NDArray[np.uint8], probability: npt.NDArray[Any], threshold: float = 0.5
) -> npt.NDArray[np.uint8]:
    """The slice in grey, tinted where the membrane is: uint8 [H, W, 3].

    Args:
        image: uint8 [H, W].
        probability: of "not membrane", [H, W] in [0, 1]; the surer the network, the stronger the tint.
        threshold: a pixel is membrane where its probability is not above this.
    """
    grey = np.repeat(image[..., np.newaxis], 3, axis=-1).astype(np.float32)
    sureness = np.where(probability <= threshold, 1 - probability.astype(np.float32), 0)[..., np.newaxis]
    mixed = grey * (1 - 0.75 * sureness) + np.array(MEMBRANE_COLOUR, np.float32) * 0.75 * sureness
    return np.asarray(np.rint(mixed), np.uint8)


def overlay_png(
    path: str | os.PathLike[str],
    image: npt.NDArray[np.uint8],
    probability: npt.NDArray[Any],
    threshold: float = 0.5,
) -> None:
    """Write the slice and, beside it, the same slice with its membrane, as one PNG."""
    from PIL import Image

    raw = np.repeat(image[..., np.newaxis], 3, axis=-1)
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    both = np.concatenate([raw, gap, membrane_overlay(image, probability, threshold)], axis=1)
    with atomic_file(path) as aside:
        Image.fromarray(both).save(aside, format="PNG")
