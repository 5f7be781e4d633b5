"""Whole slices through the network in training, by the same tile plans as the client's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from train.errors import TrainError
from unet.geometry import cheapest_tile_size, plan_tiles, predict_tiled
from unet.intensity import normalise

# From one slice, uint8 [H, W], to its probability of "not membrane", float32 [H, W].
Predictor = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]

# A 700 tile covers a 512 x 512 slice in one pass; larger slices are cut into the cheapest of these.
TILE_SIZES = (572, 700, 1020)


def make_predictor(model: tf.keras.Model) -> Predictor:
    """The network as a function of whole slices of any size.

    It raises ``TrainError`` where the network's answer is not a number: no such value gets into a file or a score.
    """

    @tf.function(reduce_retracing=True)
    def forward(image: tf.Tensor) -> tf.Tensor:
        logits = model(image, training=False)
        # The softmax of (NaN, 0) is (NaN, 0) on a CPU: the class that is looked at need not show the fault.
        sound = tf.reduce_all(tf.math.is_finite(logits), axis=-1)
        return tf.where(sound, tf.nn.softmax(logits)[..., 1], np.float32(np.nan))

    def tiles(batch: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        result: npt.NDArray[np.float32] = forward(tf.constant(normalise(batch)[..., np.newaxis])).numpy()
        return result

    def predict(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        height, width = image.shape
        plan = plan_tiles(height, width, cheapest_tile_size(height, width, TILE_SIZES))
        probability = predict_tiled(image, plan, tiles).astype(np.float32)
        if not np.isfinite(probability).all():
            share = 1 - float(np.isfinite(probability).mean())
            raise TrainError(
                f"the network answers {share:.1%} of a slice with values that are not numbers, for its weights have "
                "diverged: train again with a lower --learning_rate"
            )
        return probability

    return predict


def average_over_networks(predictors: Sequence[Predictor]) -> Predictor:
    """A predictor that averages over several networks."""

    def averaged(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        total = np.zeros(image.shape, np.float32)
        for predict in predictors:
            total += predict(image)
        return total / len(predictors)

    return predictors[0] if len(predictors) == 1 else averaged


def average_over_symmetries(predict: Predictor) -> Predictor:
    """A predictor that averages over the eight mirrorings and quarter turns of a slice."""

    def averaged(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        total = np.zeros(image.shape, np.float32)
        for turns in range(4):
            turned = np.rot90(image, turns)
            total += np.rot90(predict(np.ascontiguousarray(turned)), -turns)
            flipped = np.ascontiguousarray(turned[:, ::-1])
            total += np.rot90(predict(flipped)[:, ::-1], -turns)
        return total / 8

    return averaged
