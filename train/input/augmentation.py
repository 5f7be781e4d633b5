"""Random deformations of a training window, composed into one resampling of the slice.

Flips, rotation, crop-and-resize and the elastic field are not applied one after another: they are summed into one
map from window pixels to slice coordinates, and the slice is read once through that map. Image and label see
the same map; labels are read by nearest neighbour, so that no new label value can appear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

# Control points of the elastic field lie this many pixels apart: displacements of a Gaussian on a coarse grid with
# bicubic interpolation between, as in section 3.1 of the U-Net paper, but at a spacing that follows the window's size.
ELASTIC_SPACING_PX = 64


@dataclass(frozen=True)
class Augmentation:
    """How far a training window may be deformed. The default of each is what `--augment` does.

    Attributes:
        flip: flip left-right and up-down, each with probability one half.
        rotation: rotate by an angle drawn evenly from the full circle.
        exact: share of the windows that keep the slice's own pixels: they are turned by quarters, and neither scaled
            nor deformed, so nothing is interpolated. Interpolation blurs, and slices to segment are not blurred.
        min_scale: crop to a share of the window between this and 1 / this, then resize to the window.
        elastic_px: standard deviation of the elastic displacements at the control points, in pixels.
        brightness: largest shift of the intensities, on the scale of [-1, 1].
        contrast: largest relative change of the intensities' spread.
        gamma: largest change of the logarithm of the intensities' exponent.
        blur_px: largest standard deviation of a Gaussian blur, in pixels; half of the windows are blurred.
        noise: largest standard deviation of Gaussian noise, on the scale of [-1, 1]; half of the windows get some.
    """

    flip: bool = True
    rotation: bool = True
    exact: float = 0.5
    min_scale: float = 0.8
    elastic_px: float = 6.0
    brightness: float = 0.2
    contrast: float = 0.2
    gamma: float = 0.3
    blur_px: float = 1.0
    noise: float = 0.1


NO_AUGMENTATION = Augmentation(
    flip=False,
    rotation=False,
    exact=1.0,
    min_scale=1.0,
    elastic_px=0.0,
    brightness=0.0,
    contrast=0.0,
    gamma=0.0,
    blur_px=0.0,
    noise=0.0,
)


def elastic_field(size: int, sigma_px: float, rng: np.random.Generator) -> FloatArray:
    """A smooth random displacement field, float32 [2, size, size], in pixels."""
    # More control points than the window needs: cubic interpolation takes one beyond, and the grid's place is random.
    points = size // ELASTIC_SPACING_PX + 4
    coarse = rng.normal(0.0, sigma_px, (points, points, 2)).astype(np.float32)
    # Not cv2.remap: it reads at 1/32 of a control point's spacing, which would make stairs of 2 pixels.
    fine = cv2.resize(coarse, None, fx=ELASTIC_SPACING_PX, fy=ELASTIC_SPACING_PX, interpolation=cv2.INTER_CUBIC)
    top, left = ELASTIC_SPACING_PX + rng.integers(0, ELASTIC_SPACING_PX, 2)
    field: FloatArray = np.moveaxis(fine[top : top + size, left : left + size], -1, 0)
    return field


def linear_part(settings: Augmentation, rng: np.random.Generator, *, exact: bool = False) -> FloatArray:
    """The matrix, float32 [2, 2], of a random flip, rotation and scale, from window offsets to slice offsets.

    Args:
        settings: how far.
        rng: what it is drawn by.
        exact: turn by quarters and do not scale, so that pixels fall on pixels.
    """
    matrix = np.eye(2)
    if settings.flip:
        matrix = matrix @ np.diag(rng.choice([-1.0, 1.0], 2))
    if settings.rotation:
        angle = rng.integers(4) * np.pi / 2 if exact else rng.uniform(0, 2 * np.pi)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        matrix = matrix @ (turn.round() if exact else turn)
    if settings.min_scale < 1 and not exact:
        limit = -np.log(settings.min_scale)
        matrix = matrix * np.exp(rng.uniform(-limit, limit))
    return matrix.astype(np.float32)


def sampling_map(
    size: int, centre: tuple[float, float], settings: Augmentation, rng: np.random.Generator, *, exact: bool = False
) -> FloatArray:
    """Where each pixel of a window reads the slice: float32 [2, size, size], rows and columns in slice pixels.

    Args:
        size: of the window.
        centre: of the window, in the slice; midway between four pixels if the size is even and the map is exact.
        settings: how far it may be deformed.
        rng: what it is drawn by.
        exact: neither scale nor deform, and turn by quarters, so that pixels fall on pixels.
    """
    offsets = np.arange(size, dtype=np.float32) - np.float32((size - 1) / 2)
    rows, cols = np.meshgrid(offsets, offsets, indexing="ij")
    matrix = linear_part(settings, rng, exact=exact)
    mapped: FloatArray = np.stack(
        [
            matrix[0, 0] * rows + matrix[0, 1] * cols + np.float32(centre[0]),
            matrix[1, 0] * rows + matrix[1, 1] * cols + np.float32(centre[1]),
        ]
    )
    if settings.elastic_px > 0 and not exact:
        mapped += elastic_field(size, settings.elastic_px, rng)
    return mapped


def resample(plane: npt.NDArray[Any], mapped: FloatArray, *, nearest: bool = False) -> npt.NDArray[Any]:
    """Read ``plane`` [H, W] through a sampling map, mirrored at its borders, bilinearly or by nearest neighbour."""
    interpolation = cv2.INTER_NEAREST if nearest else cv2.INTER_LINEAR
    result: npt.NDArray[Any] = cv2.remap(plane, mapped[1], mapped[0], interpolation, borderMode=cv2.BORDER_REFLECT_101)
    return result


def change_intensities(window: FloatArray, settings: Augmentation, rng: np.random.Generator) -> FloatArray:
    """Change gamma, contrast, brightness, sharpness and noise at random; float32 [H, W] in [-1, 1] in and out.

    Other tissues and microscopes differ in all of these.
    """
    if settings.gamma > 0:
        exponent = np.float32(np.exp(rng.uniform(-settings.gamma, settings.gamma)))
        window = cv2.pow((window + 1) / 2, float(exponent)) * 2 - 1
    gain = np.float32(1 + rng.uniform(-settings.contrast, settings.contrast))
    shift = np.float32(rng.uniform(-settings.brightness, settings.brightness))
    window = window * gain + shift
    if settings.blur_px > 0 and rng.random() < 0.5:
        window = cv2.GaussianBlur(window, (0, 0), rng.uniform(0.1, settings.blur_px), borderType=cv2.BORDER_REFLECT_101)
    if settings.noise > 0 and rng.random() < 0.5:
        window = window + rng.uniform(0, settings.noise) * rng.standard_normal(window.shape, np.float32)
    return np.asarray(np.clip(window, -1, 1), np.float32)
