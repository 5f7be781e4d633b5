"""The weights that make a broken membrane expensive."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.ndimage

from unet.volume import NOT_ANNOTATED

# Ronneberger et al. (2015), equation 2.
BORDER_WEIGHT = 10.0
BORDER_SIGMA_PX = 5.0


def border_weights(
    label: npt.NDArray[np.uint8], weight: float = BORDER_WEIGHT, sigma_px: float = BORDER_SIGMA_PX
) -> npt.NDArray[np.float32]:
    """The U-Net paper's border weight of one slice: high on a membrane that alone separates two cells.

    ``weight * exp(-(d1 + d2)^2 / (2 sigma^2))`` on membrane pixels, where d1 and d2 are the distances to the nearest
    and the second nearest cell (4-connected component of the foreground); 0 elsewhere.

    Args:
        label: uint8 [H, W], 0 membrane, 1 not; 255, not annotated, is part of no cell.
        weight: the weight where both cells touch.
        sigma_px: how fast it falls off, in pixels.

    Returns:
        float32 [H, W].
    """
    cells, count = scipy.ndimage.label((label != 0) & (label != NOT_ANNOTATED))
    nearest = np.full((2, *label.shape), np.inf, dtype=np.float32)
    reach = int(np.ceil(4 * sigma_px))
    for index, box in enumerate(scipy.ndimage.find_objects(cells), start=1):
        grown = tuple(
            slice(max(0, side.start - reach), min(size, side.stop + reach)) for side, size in zip(box, label.shape)
        )
        distance = scipy.ndimage.distance_transform_edt(cells[grown] != index).astype(np.float32)
        first, second = nearest[0][grown], nearest[1][grown]
        np.minimum(second, np.maximum(first, distance), out=second)
        np.minimum(first, distance, out=first)
    if count < 2:
        return np.zeros(label.shape, np.float32)
    falloff = np.exp(-((nearest[0] + nearest[1]) ** 2) / (2 * sigma_px**2))
    return np.where(label == 0, weight * falloff, 0).astype(np.float32)
