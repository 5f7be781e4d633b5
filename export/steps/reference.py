"""The SavedModel itself, run by TensorFlow: what every later step is measured against."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unet.errors import UnetError, command
from unet.intensity import normalise
from unet.names import OUTPUT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

SIGNATURES = ("serving_default", "network")


class SavedModelError(UnetError):
    """A folder that is not a SavedModel of this project."""


def import_tensorflow() -> Any:
    """TensorFlow, without its start-up chatter.

    Raises:
        SavedModelError: it is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError as error:
        raise SavedModelError("TensorFlow is not installed: pip install 'unet-medical-triton[export]'") from error
    return tf


def load_signature(path: str | os.PathLike[str], name: str) -> Any:
    """A SavedModel's signature as a function of named tensors.

    Raises:
        SavedModelError: there is no SavedModel, or it has no such signature.
    """
    tf = import_tensorflow()
    if not (Path(path) / "saved_model.pb").is_file():
        raise SavedModelError(f"{path} is not a SavedModel: name the --model_dir of a finished training run")
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow's own kinds vary with what is broken
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SavedModelError(f"{path} cannot be loaded as a SavedModel ({reason}): write it again") from error
    if name not in loaded.signatures:
        known = ", ".join(sorted(loaded.signatures)) or "none"
        raise SavedModelError(f"{path} has no signature {name} (it has {known}): write it with train/main.py")
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
        first_logits: of each batch's first tile, float32 [1, 2, S - 184, S - 184].
        parameters: number of trained weights.
    """

    probability: list[NDArray[np.float16]]
    first_logits: list[NDArray[np.float32]]
    parameters: int

    @classmethod
    def read(cls, path: Path) -> Outputs:
        """Read what `main` wrote."""
        with np.load(path) as stored:
            count = len(stored.files) // 2
            batches = range(count)
            return cls(
                [stored[f"probability_{index}"] for index in batches],
                [stored[f"logits_{index}"] for index in batches],
                int(stored["parameters"]),
            )


def parameter_count(path: str | os.PathLike[str]) -> int:
    """Number of trained weights in a SavedModel."""
    tf = import_tensorflow()
    return sum(
        int(np.prod(shape))
        for name, shape in tf.train.list_variables(str(Path(path) / "variables" / "variables"))
        if "_CHECKPOINTABLE_OBJECT_GRAPH" not in name and len(shape) > 0
    )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run a SavedModel on stored tiles: ``python -m export.steps.reference SAVED_MODEL TILES.npz OUTPUTS.npz``."""
    parser = argparse.ArgumentParser(prog="export.steps.reference", description="Run a SavedModel on stored tiles.")
    parser.add_argument("saved_model", type=Path)
    parser.add_argument("tiles", type=Path, help=".npz of batches, uint8 [N, 1, S, S] each")
    parser.add_argument("outputs", type=Path, help=".npz to write")
    chosen = parser.parse_args(argv)
    reference = Reference(chosen.saved_model)
    values: dict[str, Any] = {"parameters": parameter_count(chosen.saved_model)}
    with np.load(chosen.tiles) as batches:
        for index, name in enumerate(batches.files):
            values[f"probability_{index}"] = reference.probability(batches[name])
            values[f"logits_{index}"] = reference.logits(batches[name][:1])
    np.savez(chosen.outputs, **values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
