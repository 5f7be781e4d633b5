"""Whole stacks in memory: images, labels, and the two together."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.volume.limits import StackError
from unet.volume.tiff.reader import StackReader

AnyArray = npt.NDArray[Any]


def read_images(path: str | os.PathLike[str]) -> AnyArray:
    """A whole stack of intensities, uint8 or uint16 [N, H, W].

    Raises:
        StackError: if the file cannot be read.
    """
    with StackReader(path) as reader:
        images = np.empty((reader.pages, reader.height, reader.width), reader.dtype)
        for index, page in enumerate(reader):
            images[index] = page
    return images


def read_labels(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """A stack of labels, uint8 [N, H, W]: 0 membrane, 1 not.

    The file may have 0 and any one other value; not every page, nor even the stack, needs to have both.

    Raises:
        StackError: if the file cannot be read, or has other values than 0 and one more.
    """
    values = {0}
    with StackReader(path) as reader:
        labels = np.empty((reader.pages, reader.height, reader.width), np.uint8)
        for index, page in enumerate(reader):
            values.update(int(value) for value in np.unique(page))
            if len(values) > 2:
                others = ", ".join(str(value) for value in sorted(values)[1:5])
                more = " ..." if len(values) > 5 else ""
                raise StackError(
                    f"{path} has the values {others}{more} beside 0 by page {index}: "
                    "labels have two values, 0 for membrane and another for not"
                )
            labels[index] = page != 0
    return labels


def load_pair(
    images_path: str | os.PathLike[str], labels_path: str | os.PathLike[str]
) -> tuple[AnyArray, npt.NDArray[np.uint8]]:
    """A stack and its labels, each [N, H, W].

    Raises:
        StackError: if either cannot be read, or they do not fit each other.
    """
    with StackReader(images_path) as images, StackReader(labels_path) as labels:
        if len(images) != len(labels):
            raise StackError(
                f"{images_path} has {len(images)} slices but {labels_path} has {len(labels)}: each slice needs a label"
            )
        if (images.height, images.width) != (labels.height, labels.width):
            raise StackError(
                f"{images_path} has slices of {images.height} x {images.width} but {labels_path} of "
                f"{labels.height} x {labels.width}: they must be of one size"
            )
    return read_images(images_path), read_labels(labels_path)
