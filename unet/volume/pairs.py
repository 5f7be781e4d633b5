"""Whole stacks in memory: images, labels, and the two together."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.volume.labels import MASKS, LabelOptions, read_labels
from unet.volume.limits import LABEL_LIMITS, StackError
from unet.volume.opening import open_volume

AnyArray = npt.NDArray[Any]


def read_images(path: str | os.PathLike[str]) -> AnyArray:
    """A whole stack of intensities, uint8 or uint16 [N, H, W].

    Raises:
        StackError: if the file cannot be read.
    """
    with open_volume(path) as volume:
        images = np.empty((volume.pages, volume.height, volume.width), volume.dtype)
        for index, page in enumerate(volume):
            images[index] = page
    return images


def load_pair(
    images_path: str | os.PathLike[str], labels_path: str | os.PathLike[str], options: LabelOptions = MASKS
) -> tuple[AnyArray, npt.NDArray[np.uint8]]:
    """A stack and its labels, each [N, H, W]; the labels as ``read_labels`` gives them.

    Raises:
        StackError: if either cannot be read, or they do not fit each other.
    """
    with open_volume(images_path) as images, open_volume(labels_path, LABEL_LIMITS) as labels:
        if len(images) != len(labels):
            raise StackError(
                f"{images_path} has {len(images)} slices but {labels_path} has {len(labels)}: each slice needs a label"
            )
        if (images.height, images.width) != (labels.height, labels.width):
            raise StackError(
                f"{images_path} has slices of {images.height} x {images.width} but {labels_path} of "
                f"{labels.height} x {labels.width}: they must be of one size"
            )
    return read_images(images_path), read_labels(labels_path, options)
