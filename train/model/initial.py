"""Weights to start from: those of another run, of a checkpoint, or of published artefacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tensorflow as tf

from train.errors import TrainError
from train.model.network import CLASSES
from train.run.checkpoints import diverged, facts_of, read_state
from train.run.folder import Run
from unet.names import SAVED_MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence

_PREFIX, _KERNEL = "model/layer_with_weights-", "/kernel/.ATTRIBUTES/VARIABLE_VALUE"


def load_initial(source: str | Path, model: tf.keras.Model) -> str:
    """Give a model the weights of a trained network.

    Args:
        source: a run's folder, of which the best weights are taken, or else the newest; a checkpoint; a folder of
            exported artefacts; or a SavedModel.
        model: of `build_unet`.

    Returns:
        What was loaded, in words.

    Raises:
        TrainError: if there is no network, or one of other filters or classes, or its weights have diverged.
    """
    path = Path(source)
    run = Run(path)
    newest = run.best().newest or run.checkpoints().newest
    if facts_of(path) is not None:
        _load_checkpoint(path, model)
    elif newest is not None:
        path = newest[0]
        _load_checkpoint(path, model)
    elif (path / "saved_model.pb").is_file():
        _load_saved_model(path, model)
    elif (path / SAVED_MODEL / "saved_model.pb").is_file():
        path = path / SAVED_MODEL
        _load_saved_model(path, model)
    else:
        raise TrainError(
            f"--init_from {source} is no trained network: name a run's --model_dir, one of its checkpoints, or a "
            "folder of exported artefacts"
        )
    fault = diverged(model.variables)
    if fault:
        raise TrainError(f"--init_from {path} has diverged ({fault}): start from another network")
    return str(path)


def _load_checkpoint(folder: Path, model: tf.keras.Model) -> None:
    shapes = tf.train.load_checkpoint(str(folder / "state")).get_variable_to_shape_map()
    kernels = {
        int(name[len(_PREFIX) : -len(_KERNEL)]): shape
        for name, shape in shapes.items()
        if name.startswith(_PREFIX) and name.endswith(_KERNEL)
    }
    _require_same(folder, kernels[min(kernels)], kernels[max(kernels)], model)
    read_state(folder, {"model": model}, partial=True)


def _load_saved_model(folder: Path, model: tf.keras.Model) -> None:
    try:
        variables = tf.saved_model.load(str(folder)).model.variables
    except (AttributeError, OSError, tf.errors.OpError, ValueError) as error:
        raise TrainError(f"--init_from {folder} is not a SavedModel of this trainer ({error})") from error
    kernels = [variable.shape for variable in variables if len(variable.shape) == 4]
    _require_same(folder, kernels[0], kernels[-1], model)
    model.set_weights([variable.numpy() for variable in variables])


def _require_same(folder: Path, first: Sequence[int], last: Sequence[int], model: tf.keras.Model) -> None:
    filters, classes = int(first[-1]), int(last[-1])
    wanted = int(model.get_layer("down0_conv1").filters)
    if filters != wanted:
        raise TrainError(
            f"--init_from {folder} has {filters} filters in its first level, but --base_filters is {wanted}: add "
            f"--base_filters {filters}"
        )
    if classes != CLASSES:
        raise TrainError(f"--init_from {folder} tells {classes} classes apart, but this network tells {CLASSES}")
