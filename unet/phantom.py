"""A synthetic stack that looks like serial-section electron microscopy, with its labels.

It stands in for real slices where there are none: for tests, and for a demo whose pictures may be shown to anyone.
Cells are a Voronoi partition under a smooth warp that drifts from slice to slice; their borders are dark membranes of
varying width and contrast; organelles and dark grains are there to be mistaken for membranes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.ndimage
import scipy.spatial

from unet.errors import UnetError, command, say
from unet.stack import StackWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

FloatArray = npt.NDArray[np.float64]

CELL_AREA_PX = 1700
DRIFT_PX = 1.6


class PhantomError(UnetError):
    """A synthetic stack that cannot be made."""


def synthetic_stack(
    slices: int = 30, size: int = 512, seed: int = 0
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Make a stack and its labels.

    Args:
        slices: how many.
        size: rows and columns of each, in pixels.
        seed: the same seed gives the same stack.

    Returns:
        (images uint8 [slices, size, size], labels uint8 [slices, size, size]: 0 membrane, 1 not).

    Raises:
        PhantomError: if there would be no pixels.
    """
    if slices < 1 or size < 16:
        raise PhantomError(f"a synthetic stack of {slices} slices of {size} pixels is too small: at least 1 of 16")
    rng = np.random.default_rng(seed)
    margin = 60
    area = (size + 2 * margin) ** 2
    centres = rng.uniform(-margin, size + margin, (max(4, area // CELL_AREA_PX), 2))
    # Cells differ in size: some centres are doubled up close by and merged into one.
    owner = np.arange(len(centres))
    merged = rng.random(len(centres)) < 0.35
    nearest = scipy.spatial.cKDTree(centres).query(centres, k=2)[1][:, 1]
    owner[merged] = owner[nearest[merged]]
    drift = rng.normal(0, DRIFT_PX, centres.shape)
    shade = rng.normal(0, 13, len(centres))
    warp = _smooth_series(rng, slices, size, 22.0, 13.0)
    width = np.maximum(2.2 + 0.45 * _smooth_series(rng, slices, size, 16.0, 1.0)[0], 1.5)
    images, labels = [], []
    for index in range(slices):
        drift = 0.9 * drift + rng.normal(0, 0.45 * DRIFT_PX, centres.shape)
        centres = centres + drift
        cells, distance = _cells(centres, owner, warp[:, index])
        images.append(_render(rng, cells, distance, width[index], shade))
        labels.append((distance > width[index]).astype(np.uint8))
    return np.stack(images), np.stack(labels)


def _smooth_series(rng: np.random.Generator, slices: int, size: int, sigma_px: float, amplitude: float) -> FloatArray:
    """Two smooth random fields that change slowly over slices, [2, slices, size, size], of deviation ``amplitude``."""
    # Computed at an eighth of the resolution: nothing in it is finer than that.
    step = 8
    coarse = -(-size // step) + 2
    noise = rng.normal(size=(2, slices, coarse, coarse))
    smooth = scipy.ndimage.gaussian_filter(noise, (0, 3, sigma_px / step, sigma_px / step), mode="wrap")
    smooth *= amplitude / smooth.std()
    zoomed = [[scipy.ndimage.zoom(plane, step, order=1)[:size, :size] for plane in series] for series in smooth]
    return np.array(zoomed)


def _cells(
    centres: FloatArray, owner: npt.NDArray[np.intp], warp: FloatArray
) -> tuple[npt.NDArray[np.intp], FloatArray]:
    """The cell of each pixel and the pixel's distance, in pixels, to the nearest other cell."""
    size = warp.shape[-1]
    rows, cols = np.mgrid[:size, :size] + warp
    _, near = scipy.spatial.cKDTree(centres).query(np.stack([rows, cols], -1))
    cells = owner[near]
    border = np.zeros((size, size), bool)
    border[:, :-1] |= cells[:, :-1] != cells[:, 1:]
    border[:-1] |= cells[:-1] != cells[1:]
    distance = scipy.ndimage.distance_transform_edt(~border) if border.any() else np.full((size, size), np.inf)
    return cells, np.asarray(distance)


def _render(
    rng: np.random.Generator, cells: npt.NDArray[np.intp], distance: FloatArray, width: FloatArray, shade: FloatArray
) -> npt.NDArray[np.uint8]:
    """One slice as the microscope shows it, uint8."""
    shape = cells.shape
    texture = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 1.6)
    coarse = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 6)
    image = 163 + shade[cells] + 19 * texture / texture.std() + 7 * coarse / coarse.std()
    # Membranes fade in places, as where they are cut at a slant.
    fading = scipy.ndimage.gaussian_filter(rng.normal(size=shape), 14)
    contrast = 98 + 20 * fading / fading.std()
    image -= contrast * np.exp(-((distance / (0.85 * width)) ** 2))
    _organelles(rng, image, distance)
    image = scipy.ndimage.gaussian_filter(image, 0.8) + rng.normal(0, 13, shape)
    return np.asarray(np.clip(image, 0, 255), np.uint8)


def _organelles(rng: np.random.Generator, image: FloatArray, distance: FloatArray) -> None:
    """Draw mitochondria (dark, striped, round) and vesicles (small dark rings) where there is room for them."""
    size = image.shape[0]
    grid = np.mgrid[:size, :size]
    for _ in range(max(1, size * size // 5000)):
        row, col = rng.integers(0, size, 2)
        room = distance[row, col]
        large = bool(room > 13 and rng.random() < 0.6)
        if not large and room < 7:
            continue
        radius = rng.uniform(0.6, 0.85) * min(room, 17) if large else rng.uniform(2.5, 4.0)
        reach = int(radius) + 4
        box = (slice(max(0, row - reach), row + reach), slice(max(0, col - reach), col + reach))
        dy, dx = grid[0][box] - row, grid[1][box] - col
        far = np.hypot(dy, dx * rng.uniform(0.75, 1.25))
        ring = np.exp(-(((far - radius) / 1.3) ** 2))
        if large:
            angle = rng.uniform(0, np.pi)
            stripes = np.sin((dy * np.cos(angle) + dx * np.sin(angle)) * 1.1 + rng.uniform(0, 6))
            image[box] -= (far < radius) * (62 + 26 * stripes) + 45 * ring
        else:
            image[box] -= 62 * ring


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write a synthetic data folder, laid out like that of ISBI 2012."""
    parser = argparse.ArgumentParser(prog="unet.phantom", description="Write a synthetic stack with labels.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train-volume.tif and so on")
    parser.add_argument("--slices", type=int, default=30, help="slices in each stack (default: 30)")
    parser.add_argument("--size", type=int, default=512, help="rows and columns of a slice (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the stack (default: 0)")
    chosen = parser.parse_args(argv)
    images, labels = synthetic_stack(chosen.slices, chosen.size, chosen.seed)
    tests, _ = synthetic_stack(chosen.slices, chosen.size, chosen.seed + 1)
    stacks = (("train-volume.tif", images), ("train-labels.tif", labels * np.uint8(255)), ("test-volume.tif", tests))
    for name, stack in stacks:
        with StackWriter(chosen.out / name, None, np.uint8) as writer:
            for page in stack:
                writer.append(page)
        say(str(chosen.out / name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
