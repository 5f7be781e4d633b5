"""The SavedModel itself, run by TensorFlow on the CPU: what every later step is measured against.

A GPU would multiply float32 in fewer digits (TF32), and some of its sums depend on chance.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ExportError
from unet.errors import command
from unet.intensity import normalise
from unet.names import OUTPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SIGNATURES = ("serving_default", "network")


def import_tensorflow() -> Any:
    """TensorFlow on the CPU, deterministic, without its start-up chatter.

    Raises:
        ExportError: it is not installed, or was already started on a GPU in this process.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ExportError("TensorFlow is not installed: pip install 'unet-medical-triton[export]'") from error
    try:
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError as error:
        raise ExportError("TensorFlow already runs on a GPU in this process: export in a process of its own") from error
    tf.config.experimental.enable_op_determinism()
    return tf


def load_signature(path: str | os.PathLike[str], name: str) -> Any:
    """A SavedModel's signature as a function of named tensors.

    Raises:
        ExportError: there is no SavedModel, or it has no such signature.
    """
    tf = import_tensorflow()
    if not (Path(path) / "saved_model.pb").is_file():
        raise ExportError(f"{path} is not a SavedModel: name the --model_dir of a finished training run")
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow's own kinds vary with what is broken
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{path} cannot be loaded as a SavedModel ({reason}): write it again") from error
    if name not in loaded.signatures:
        known = ", ".join(sorted(loaded.signatures)) or "none"
        raise ExportError(f"{path} has no signature {name} (it has {known}): write it with train/main.py")
    signature = loaded.signatures[name]
    signature.owner = loaded  # the variables live as long as their owner
    return signature


class Reference:
    """Both signatures of a SavedModel as functions of channels-first arrays.

    Tiles are run one at a time: memory stays that of one tile.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._serve, self._network = (load_signature(path, name) for name in SIGNATURES)

    def probability(self, image: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Image [N, 1, H, W] to ``probability`` [N, 1, H - 184, W - 184]."""
        return np.concatenate([self._run(self._serve, tile, OUTPUT) for tile in image])

    def logits(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Image [N, 1, H, W] to ``logits`` [N, 2, H - 184, W - 184], normalised by ``unet.intensity``."""
        return np.concatenate([self._run(self._network, normalise(tile), "logits") for tile in image])

    @staticmethod
    def _run(signature: Any, tile: NDArray[Any], output: str) -> NDArray[Any]:
        tf = import_tensorflow()
        result = signature(image=tf.constant(tile[..., None]))[output].numpy()
        return np.ascontiguousarray(np.moveaxis(result, -1, 1))


@dataclass(frozen=True)
class Outputs:
    """What a SavedModel makes of tiles.

    Attributes:
        probability: for each batch of tiles, float16 [N, 1, S - 184, S - 184].
        first_logits: of the first tile of the first batches, float32 [1, 2, S - 184, S - 184].
        parameters: number of trained weights.
    """

    probability: list[NDArray[np.float16]]
    first_logits: list[NDArray[np.float32]]
    parameters: int

    @classmethod
    def read(cls, path: Path) -> Outputs:
        """Read what `main` wrote."""
        with np.load(path) as stored:
            kinds = ("probability", "logits")
            probability, logits = ([stored[name] for name in stored.files if name.startswith(kind)] for kind in kinds)
            return cls(probability, logits, int(stored["parameters"]))


def parameter_count(path: str | os.PathLike[str]) -> int:
    """Number of trained weights in a SavedModel.

    Raises:
        ExportError: one of them is NaN or infinite. TensorFlow's ReLU makes zero of NaN, so its answers do not show it.
    """
    tf = import_tensorflow()
    stored = tf.train.load_checkpoint(str(Path(path) / "variables" / "variables"))
    shapes = stored.get_variable_to_shape_map()
    names = [name for name, shape in shapes.items() if "_CHECKPOINTABLE_OBJECT_GRAPH" not in name and shape]
    for name in names:
        if not np.isfinite(stored.get_tensor(name)).all():
            raise ExportError(
                f"{path} has weights that are NaN or infinite: its training diverged; train with a lower "
                "--learning_rate, or from a checkpoint before that"
            )
    return sum(int(np.prod(shapes[name])) for name in names)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run a SavedModel on stored tiles: ``python -m export.steps.reference SAVED_MODEL TILES.npz 2 OUTPUTS.npz``."""
    parser = argparse.ArgumentParser(prog="export.steps.reference", description="Run a SavedModel on stored tiles.")
    parser.add_argument("saved_model", type=Path)
    parser.add_argument("tiles", type=Path, help=".npz of batches, uint8 [N, 1, S, S] each")
    parser.add_argument("logits", type=int, help="of how many of the batches the first tile's logits are wanted")
    parser.add_argument("outputs", type=Path, help=".npz to write")
    chosen = parser.parse_args(argv)
    reference = Reference(chosen.saved_model)
    values: dict[str, Any] = {"parameters": parameter_count(chosen.saved_model)}
    with np.load(chosen.tiles) as batches:
        for index, name in enumerate(batches.files):
            values[f"probability_{index}"] = reference.probability(batches[name])
            if index < chosen.logits:
                values[f"logits_{index}"] = reference.logits(batches[name][:1])
    np.savez(chosen.outputs, **values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
