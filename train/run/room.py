"""Whether the disk has room for what a run will write."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from train.errors import TrainError
from train.run.checkpoints import KEPT

if TYPE_CHECKING:
    import tensorflow as tf

    from train.run.folder import Run


def require_room(run: Run, weights: list[tf.Variable], state: list[tf.Variable]) -> None:
    """Refuse a run whose checkpoints the disk cannot hold, before it computes for hours.

    Args:
        run: its folder.
        weights: of the network, which ``best/`` and the SavedModel hold.
        state: all variables of a checkpoint.

    Raises:
        TrainError: with what is free and what is needed.
    """
    # One more of each is written before the oldest is removed.
    needed = (KEPT + 1) * _bytes(state) + 4 * _bytes(weights)
    present = sum(path.stat().st_size for path in run.folder.rglob("*") if path.is_file())
    folder = next(path for path in (run.folder, *run.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free + present < needed:
        raise TrainError(
            f"the disk of {run.folder} has {free / 2**20:.0f} MiB free, but the run's checkpoints take "
            f"{needed / 2**20:.0f} MiB: free some space, or choose another --model_dir"
        )


def _bytes(variables: list[tf.Variable]) -> int:
    return sum(int(variable.shape.num_elements()) * int(variable.dtype.size) for variable in variables)
