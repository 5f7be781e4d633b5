"""Images and the labels that belong to them: which files they are, and both whole in memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.volume.hdf5 import has_pair
from unet.volume.labels import MASKS, LabelOptions, read_labels
from unet.volume.limits import LABEL_LIMITS, StackError
from unet.volume.opening import is_volume, made_here, open_volume

AnyArray = npt.NDArray[Any]
_IMAGES, _LABELS = "-volume", "-labels"


def stacks_in(folder: Path) -> list[Path]:
    """The image stacks in a folder: `NAME-volume` in any format that is read, and HDF5 files with labels in them.

    Results of this program, hidden files and what is no volume are left out.
    """
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in entries if _belongs(path, "", _IMAGES) or (_IMAGES not in path.name and has_pair(path))]


def labels_of(images: Path) -> Path | None:
    """The labels of a stack: `NAME-labels` beside it, in any format, or the HDF5 file itself; None without any."""
    name, mark, ending = images.name.rpartition(_IMAGES)
    if not mark:
        return images if has_pair(images) else None
    alike = images.with_name(f"{name}{_LABELS}{ending}")
    if alike.exists():
        return alike
    return next((path for path in sorted(images.parent.iterdir()) if _belongs(path, name, _LABELS)), None)


def _belongs(path: Path, name: str, mark: str) -> bool:
    """Whether a file or folder is a volume with ``mark`` at the end of its name, after ``name`` or, if "", any."""
    before, found, ending = path.name.rpartition(mark)
    if not found or ending[:1] not in ("", ".") or (name and before != name) or before.startswith("."):
        return False
    return path.is_dir() or (is_volume(path) and not made_here(path))


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
    check_pair(images_path, labels_path)
    return read_images(images_path), read_labels(labels_path, options)


def check_pair(images_path: str | os.PathLike[str], labels_path: str | os.PathLike[str]) -> None:
    """Compare the shapes of a stack and its labels, without reading their pixels.

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
