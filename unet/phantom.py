"""A synthetic stack that looks like serial-section electron microscopy of nervous tissue, with its labels.

It replaces real slices where there are none: in tests, and in a demo whose pictures may be shown to anyone.
A few large cells, stretched ones and many small ones fill the plane and drift from slice to slice. Their borders are
dark membranes, blurred where they are cut at a slant. Mitochondria, vesicles and grains look like membranes. Sizes and
intensities are near those of the ISBI 2012 slices (4 nm pixels, 50 nm sections).
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError, command, say
from unet.volume import StackWriter

if TYPE_CHECKING:
    from collections.abc import Sequence

Plane = npt.NDArray[np.float32]
Floats = npt.NDArray[np.floating[Any]]

# (share of cells tried, smallest and largest radius, longest half length), in pixels.
_KINDS = ((0.02, 34, 66, 8), (0.2, 13, 26, 30), (0.78, 3, 11, 24))
_MARGIN_PX = 80
_REACH_PX = 32
_DRIFT_PX = 1.8


@dataclass(frozen=True)
class _Cells:
    """The cells of one slice, each a disc stretched to a capsule; arrays of one entry per cell.

    Attributes:
        centre: row and column, in pixels, [N, 2].
        radius: in pixels.
        half_length: of the line that the capsule is drawn around, in pixels.
        angle: of that line, in radians.
        shade: how much lighter than the mean its inside is.
        vesicles: how many to a thousand pixels.
        mitochondrion: its larger half axis in pixels, 0 for none.
    """

    centre: Floats
    radius: Floats
    half_length: Floats
    angle: Floats
    shade: Floats
    vesicles: Floats
    mitochondrion: Floats


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
        UnetError: if there would be too few pixels.
    """
    if slices < 1 or size < 16:
        raise UnetError(f"a synthetic stack of {slices} slices of {size} pixels is too small: at least 1 of 16")
    rng = np.random.default_rng(seed)
    cells = _pack(rng, size)
    drift = rng.normal(0, _DRIFT_PX, cells.centre.shape)
    first_radius = cells.radius
    swelling = rng.normal(0, 0.12, len(cells.radius))
    bends = [_smooth_series(rng, slices, size, 24, 7), _smooth_series(rng, slices, size, 24, 7)]
    wiggles = [_smooth_series(rng, slices, size, 7, 2.0), _smooth_series(rng, slices, size, 7, 2.0)]
    slant = _smooth_series(rng, slices, size, 20, 1)
    images = np.empty((slices, size, size), np.uint8)
    labels = np.empty((slices, size, size), np.uint8)
    for index in range(slices):
        drift = 0.9 * drift + rng.normal(0, 0.45 * _DRIFT_PX, drift.shape)
        swelling = 0.93 * swelling + rng.normal(0, 0.05, swelling.shape)
        cells = replace(cells, centre=cells.centre + drift, radius=first_radius * (1 + swelling))
        warp = np.stack([bend[index] + wiggle[index] for bend, wiggle in zip(bends, wiggles)])
        owner, distance = _partition(cells, warp)
        # Where a membrane is cut at a slant it is broad and pale.
        smudge = np.clip(slant[index] - 1.1, 0, 1.2)
        width = 2.3 + 3.2 * smudge
        images[index] = _render(rng, cells, owner, distance, width, smudge)
        labels[index] = distance > width
    return images, labels


def _pack(rng: np.random.Generator, size: int) -> _Cells:
    """Cells that hardly overlap, the large ones first, over the slice and a margin around it."""
    side = size + 2 * _MARGIN_PX
    tries = side**2 // 180
    columns: list[tuple[float, ...]] = []
    placed = np.empty((0, 3))
    for share, smallest, largest, longest in _KINDS:
        for _ in range(max(1, int(share * tries))):
            row, col = rng.uniform(-_MARGIN_PX, size + _MARGIN_PX, 2)
            radius = rng.uniform(smallest, largest)
            half = longest * max(0.0, rng.uniform(-1, 1))
            angle = rng.uniform(0, np.pi)
            # The capsule as discs along its line, which are what others must keep away from.
            steps = np.linspace(-half, half, 1 + 2 * int(half / 6))
            discs = np.column_stack(
                [row + steps * np.sin(angle), col + steps * np.cos(angle), np.full(steps.size, radius)]
            )
            gaps = np.hypot(discs[:, None, 0] - placed[:, 0], discs[:, None, 1] - placed[:, 1])
            if (gaps < discs[:, None, 2] + placed[:, 2] + 3).any():
                continue
            placed = np.concatenate([placed, discs])
            columns.append((row, col, radius, half, angle))
    row, col, radius, half, angle = np.array(columns).T
    count = len(radius)
    bouton = (radius > 20) & (rng.random(count) < 0.6) | (rng.random(count) < 0.1)
    return _Cells(
        centre=np.column_stack([row, col]),
        radius=radius,
        half_length=half,
        angle=angle,
        shade=rng.normal(0, 10, count),
        vesicles=np.where(bouton, rng.uniform(4, 11, count), rng.uniform(0, 3, count)),
        mitochondrion=np.where(
            (radius > 13) & (rng.random(count) < 0.45), rng.uniform(0.4, 0.75, count) * np.minimum(radius, 38), 0
        ),
    )


def _smooth_series(rng: np.random.Generator, slices: int, size: int, sigma_px: float, amplitude: float) -> Plane:
    """A smooth random field that changes slowly over slices, [slices, size, size], of deviation ``amplitude``."""
    import scipy.ndimage

    # Computed at a fraction of the resolution: nothing in it is finer than that.
    step = max(2, int(sigma_px / 3))
    coarse = -(-size // step) + 2
    noise = rng.standard_normal((slices, coarse, coarse), np.float32)
    smooth = scipy.ndimage.gaussian_filter(noise, (2, sigma_px / step, sigma_px / step), mode="wrap")
    smooth *= amplitude / max(float(smooth.std()), 1e-6)
    return np.stack([scipy.ndimage.zoom(plane, step, order=1)[:size, :size] for plane in smooth])


def _partition(cells: _Cells, warp: Plane) -> tuple[npt.NDArray[np.intp], Plane]:
    """The cell of each pixel, and its distance in pixels to the nearest border; -1 is what lies between cells."""
    import scipy.ndimage

    size = warp.shape[-1]
    rows, cols = np.mgrid[:size, :size].astype(np.float32) + warp
    nearest = np.full((size, size), _REACH_PX, np.float32)
    owner = np.full((size, size), -1, np.intp)
    slack = int(np.abs(warp).max()) + 1
    for number, (row, col) in enumerate(cells.centre):
        radius, half = float(cells.radius[number]), float(cells.half_length[number])
        reach = int(radius + half + _REACH_PX) + slack
        top, left = max(0, int(row) - reach), max(0, int(col) - reach)
        box = (slice(top, max(0, int(row) + reach)), slice(left, max(0, int(col) + reach)))
        dy, dx = rows[box] - np.float32(row), cols[box] - np.float32(col)
        if half > 0:
            sin, cos = np.float32(np.sin(cells.angle[number])), np.float32(np.cos(cells.angle[number]))
            along = np.clip(dy * sin + dx * cos, -half, half)
            dy, dx = dy - along * sin, dx - along * cos
        outside = np.sqrt(dy * dy + dx * dx) - np.float32(radius)
        closer = outside < nearest[box]
        nearest[box][closer] = outside[closer]
        owner[box][closer] = number
    border = np.zeros((size, size), bool)
    border[:, :-1] |= owner[:, :-1] != owner[:, 1:]
    border[:-1] |= owner[:-1] != owner[1:]
    if not border.any():
        return owner, np.full((size, size), size, np.float32)
    return owner, scipy.ndimage.distance_transform_edt(~border).astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, ...], sigma_px: float, amplitude: float) -> Plane:
    import scipy.ndimage

    smooth = scipy.ndimage.gaussian_filter(rng.standard_normal(shape, np.float32), sigma_px, mode="wrap", truncate=3)
    return np.asarray(smooth * np.float32(amplitude / max(float(smooth.std()), 1e-6)), np.float32)


def _render(
    rng: np.random.Generator,
    cells: _Cells,
    owner: npt.NDArray[np.intp],
    distance: Plane,
    width: Plane,
    smudge: Plane,
) -> npt.NDArray[np.uint8]:
    """One slice as the microscope shows it, uint8."""
    import scipy.ndimage

    shape = owner.shape
    shade = np.append(cells.shade, -20).astype(np.float32)
    image = 163 + shade[owner] + _noise(rng, shape, 1.0, 19) + _noise(rng, shape, 2.4, 11)
    image += scipy.ndimage.zoom(_noise(rng, tuple(-(-side // 8) for side in shape), 1.5, 13), 8, order=1)[
        : shape[0], : shape[1]
    ]
    _draw_mitochondria(rng, image, cells, owner, distance)
    _draw_vesicles(rng, image, cells, owner, distance)
    # Dense grains everywhere, and the dark stuff of synapses along a few stretches of membrane.
    grains = (rng.random(shape) < 0.0025).astype(np.float32)
    image -= 400 * scipy.ndimage.gaussian_filter(grains, 1.1, truncate=3)
    synapse = _noise(rng, tuple(-(-side // 8) for side in shape), 1.6, 1)
    synapse = np.clip(scipy.ndimage.zoom(synapse, 8, order=1)[: shape[0], : shape[1]] - 1.9, 0, 1)
    image -= 95 * synapse * np.exp(-distance / 9)
    depth = (97 + _noise(rng, shape, 5, 15)) / (1 + 0.55 * smudge)
    image -= depth * np.exp(-((distance / (0.9 * width)) ** 2)) + 18 * np.exp(-distance / (2.2 * width))
    image = scipy.ndimage.gaussian_filter(image, 0.7, truncate=3)
    image += rng.normal(0, 11, shape).astype(np.float32)
    return np.asarray(np.clip(image, 0, 255), np.uint8)


def _draw_mitochondria(
    rng: np.random.Generator,
    image: Plane,
    cells: _Cells,
    owner: npt.NDArray[np.intp],
    distance: Plane,
) -> None:
    """Draw dark, finely striped ellipses with a dark rim, off the centre of cells that have one."""
    for number in np.flatnonzero(cells.mitochondrion):
        long = float(cells.mitochondrion[number])
        turn = cells.angle[number] * 5
        row, col = cells.centre[number] + 0.35 * (cells.radius[number] - long) * np.array([np.sin(turn), np.cos(turn)])
        box, dy, dx = _window(image.shape[0], row, col, long + 4)
        if dy.size == 0 or dx.size == 0:
            continue
        sin, cos = np.sin(cells.angle[number]), np.cos(cells.angle[number])
        along, across = dy * sin + dx * cos, dy * cos - dx * sin
        rim = (np.hypot(along, across * 1.35) - long + 1.2 * np.sin(3 * np.arctan2(across, along) + turn)) / 1.35
        inside = (owner[box] == number) & (distance[box] > 3) & (rim < 2.5)
        stripes = np.sin(along * 1.5 + 0.9 * np.sin(across * 0.35 + turn) + rng.uniform(0, 6))
        body = (rim < 0) * (52 + 20 * stripes) + 50 * np.exp(-((rim / 1.5) ** 2))
        image[box] -= np.where(inside, body, 0).astype(np.float32)


def _draw_vesicles(
    rng: np.random.Generator,
    image: Plane,
    cells: _Cells,
    owner: npt.NDArray[np.intp],
    distance: Plane,
) -> None:
    """Draw small dark rings, some with a dark core, in clouds where a cell has many."""
    wanted = np.append(cells.vesicles, 0)[owner] / 1000
    places = np.argwhere((rng.random(image.shape) < wanted) & (distance > 5.5))
    for row, col in places:
        radius = rng.uniform(2.2, 3.6)
        box, dy, dx = _window(image.shape[0], row, col, 6)
        far = np.hypot(dy, dx * rng.uniform(0.8, 1.25)).astype(np.float32)
        ring = rng.uniform(38, 75) * np.exp(-(((far - radius) / 0.95) ** 2))
        image[box] -= ring + (rng.random() < 0.12) * 60 * np.exp(-((far / 1.6) ** 2))


def _window(size: int, row: float, col: float, reach: float) -> tuple[tuple[slice, slice], Floats, Floats]:
    """The part of a slice within ``reach`` of a point, and its rows and columns counted from the point."""
    rows = slice(max(0, int(row - reach)), min(size, max(0, int(row + reach) + 1)))
    cols = slice(max(0, int(col - reach)), min(size, max(0, int(col + reach) + 1)))
    return (rows, cols), np.arange(rows.start, rows.stop)[:, None] - row, np.arange(cols.start, cols.stop) - col


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
