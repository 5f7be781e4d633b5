"""The trained network as a SavedModel, the one thing that the exporter takes over from the trainer."""

from __future__ import annotations

from pathlib import Path

import tensorflow as tf

from train.errors import TrainError
from train.model.network import build_unet
from train.run.checkpoints import diverged, naming_a_full_disk
from unet.files import atomic_directory


class _Serving(tf.Module):
    def __init__(self, model: tf.keras.Model) -> None:
        super().__init__(name="unet")
        self.model = model

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 1], tf.uint8, name="image")])
    def serve(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Raw intensities to the probability of "not membrane"; `unet.intensity.normalise` in the graph."""
        logits = self.model(tf.cast(image, tf.float32) * (1.0 / 127.5) - 1.0, training=False)
        return {"probability": tf.cast(tf.nn.softmax(logits)[..., 1:], tf.float16)}

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 1], tf.float32, name="image")])
    def network(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Intensities in [-1, 1] to logits."""
        return {"logits": self.model(image, training=False)}


def write_saved_model(model: tf.keras.Model, path: str | Path) -> None:
    """Write ``model`` as a SavedModel, whole or not at all, in float32 whatever precision it was trained in.

    Signatures:
        ``serving_default``: ``image`` uint8 [N, H, W, 1] -> ``probability`` float16 [N, H-184, W-184, 1],
        1 where certainly not membrane.
        ``network``: ``image`` float32 [N, H, W, 1] in [-1, 1] -> ``logits`` float32 [N, H-184, W-184, 2].

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
    with naming_a_full_disk(Path(path)), atomic_directory(path) as aside:
        tf.saved_model.save(
            serving, str(aside), signatures={"serving_default": serving.serve, "network": serving.network}
        )
