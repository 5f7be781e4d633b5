"""Where the stacks of a data folder are."""

from __future__ import annotations

from pathlib import Path

from train.errors import TrainError
from unet.volume import labels_of, stacks_in

_TEST = "test-"


def find_pairs(data_dir: str | Path) -> list[tuple[Path, Path]]:
    """The (images, labels) files under ``data_dir``: any number of `NAME-volume` with `NAME-labels`, in any format.

    A `test-volume` is what `predict` segments and is left out.

    Raises:
        TrainError: if there is none, or an images file has no labels.
    """
    folder = Path(data_dir)
    pairs = []
    for images in stacks_in(folder):
        if images.name.startswith(_TEST):
            continue
        labels = labels_of(images)
        if labels is None:
            wanted = images.with_name(images.name.replace("-volume", "-labels"))
            raise TrainError(f"{images} has no labels: {wanted} does not exist; put the label stack there")
        pairs.append((images, labels))
    if not pairs:
        raise TrainError(
            f"no training stack in {folder}: put train-volume.tif and train-labels.tif there, name another folder with "
            "--data_dir, or make a synthetic stack with `python -m unet.phantom --out FOLDER`"
        )
    return pairs


def find_test(data_dir: str | Path) -> Path:
    """The stack under ``data_dir`` that `predict` segments.

    Raises:
        TrainError: if there is none.
    """
    for images in stacks_in(Path(data_dir)):
        if images.name.startswith(f"{_TEST}volume"):
            return images
    raise TrainError(
        f"{Path(data_dir) / 'test-volume.tif'} does not exist, and this mode segments it: put it there, or only train "
        "with --exec_mode train"
    )
