"""A picture of one slice with its membrane drawn over it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError
from unet.files import atomic_file

MEMBRANE_COLOUR = (255, 64, 32)
OPACITY = 0.75
GAP_PX = 8
MAX_SIDE_PX = 2048
# What this program's name in its files begins with.
SOFTWARE = "unet-medical-triton"


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
    mixed = grey + (np.array(MEMBRANE_COLOUR, np.float32) - grey) * (OPACITY * sureness)
    return np.asarray(np.rint(mixed), np.uint8)


def overlay_png(
    path: str | os.PathLike[str],
    image: npt.NDArray[np.uint8],
    probability: npt.NDArray[Any],
    threshold: float = 0.5,
) -> None:
    """Write the slice and, beside it, the same slice with its membrane, as one PNG.

    A slice of more than 2048 pixels is shown smaller, by a whole factor: means of its intensities, and the surest
    membrane of its probabilities, so that thin membranes stay.

    Raises:
        UnetError: if the probability is not of the slice's shape.
    """
    from PIL import Image, PngImagePlugin

    if image.ndim != 2 or image.shape != probability.shape:
        raise UnetError(f"{path} cannot show a probability of {probability.shape} over a slice of {image.shape}")
    image, probability = shrink(image, probability, shrink_factor(*image.shape))
    raw = np.repeat(image[..., np.newaxis], 3, axis=-1)
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    both = np.concatenate([raw, gap, membrane_overlay(image, probability, threshold)], axis=1)
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SOFTWARE)
    with atomic_file(path) as aside:
        Image.fromarray(both).save(aside, format="PNG", compress_level=1, pnginfo=about)


def shrink_factor(height: int, width: int) -> int:
    """By how much the sides of a slice of this size are divided in its picture."""
    return -(-max(height, width) // MAX_SIDE_PX)


def shrink(
    image: npt.NDArray[np.uint8], probability: npt.NDArray[Any], factor: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """A slice [H, W] and its probability, both divided by a whole factor; strips of its rows may be done one by one.

    Strips must begin at multiples of the factor.
    """
    if factor == 1:
        return image, probability
    smaller = np.asarray(np.rint(_blocks(image, factor).mean(axis=(1, 3), dtype=np.float32)), np.uint8)
    return smaller, _blocks(probability, factor).min(axis=(1, 3))


def _blocks(plane: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    """A plane [H, W] as [H / factor, factor, W / factor, factor], its last rows and columns repeated to fill up."""
    fill = [(0, -side % factor) for side in plane.shape]
    filled = np.pad(plane, fill, mode="edge")
    return filled.reshape(filled.shape[0] // factor, factor, filled.shape[1] // factor, factor)
