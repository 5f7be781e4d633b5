"""The trained network as a SavedModel, the one thing that the exporter takes over from the trainer."""

from __future__ import annotations

import functools
from pathlib import Path

import tensorflow as tf

from train.errors import TrainError
from train.model.network import build_unet
from train.run.checkpoints import diverged, naming_disk_faults
from unet.files import atomic_directory


class _Serving(tf.Module):
    def __init__(self, model: tf.keras.Model) -> None:
        super().__init__(name="unet")
        self._logits = functools.partial(model, training=False)
        # Not the Keras model: to save that takes 7 s more, since Keras traces each layer, which nobody calls.
        self.model = tf.train.Checkpoint()
        self.model.variables = model.variables

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 1], tf.uint8, name="image")])
    def serve(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Raw intensities to the probability of "not membrane"; `unet.intensity.normalise` in the graph."""
        logits = self._logits(tf.cast(image, tf.float32) * (1.0 / 127.5) - 1.0)
        return {"probability": tf.cast(tf.nn.softmax(logits)[..., 1:], tf.float16)}

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 1], tf.float32, name="image")])
    def network(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Intensities in [-1, 1] to logits."""
        return {"logits": self._logits(image)}


def write_saved_model(model: tf.keras.Model, path: str | Path) -> None:
    """Write ``model`` as a SavedModel, whole or not at all, in float32 whatever precision it was trained in.

    Signatures:
        ``serving_default``: ``image`` uint8 [N, H, W, 1] -> ``probability`` float16 [N, H-184, W-184, 1],
        1 where certainly not membrane.
        ``network``: ``image`` float32 [N, H, W, 1] in [-1, 1] -> ``logits`` float32 [N, H-184, W-184, 2].

    The loaded object has the weights in ``model.variables``, in the order of the Keras model's.

    Raises:
        TrainError: if a weight is no number.
        OSError: if the disk is full; what was there stays.
    """
    fault = diverged(model.variables)
    if fault:
        raise TrainError(f"{path} is not written, because the weights have diverged ({fault}): train again")
    plain = build_unet(base_filters=model.get_layer("down0_conv1").filters)
    plain.set_weights(model.get_weights())
    serving = _Serving(plain)
    with naming_disk_faults(Path(path)), atomic_directory(path) as aside:
        tf.saved_model.save(
            serving, str(aside), signatures={"serving_default": serving.serve, "network": serving.network}
        )
