from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from train.errors import TrainError
from train.model.dropout import WindowDropout
from train.model.network import CentreCrop, UpConvolution, build_unet
from train.model.saved_model import write_saved_model


def test_published_size_has_31030658_parameters() -> None:
    assert build_unet(64).count_params() == 31_030_658


@pytest.mark.parametrize(("height", "width"), [(188, 188), (204, 236)])
def test_output_is_184_smaller(height: int, width: int) -> None:
    logits = build_unet(2)(np.zeros((2, height, width, 1), np.float32))
    assert logits.shape == (2, height - 184, width - 184, 2)
    assert logits.dtype == tf.float32


def test_up_convolution_is_the_transposed_convolution() -> None:
    rng = np.random.default_rng(0)
    layer = UpConvolution(3)
    inputs = rng.normal(size=(2, 5, 4, 6)).astype(np.float32)
    layer(inputs)
    layer.bias.assign(rng.normal(size=3))
    # conv2d_transpose keeps its kernel as [row, column, out, in].
    kernel = tf.transpose(tf.reshape(layer.kernel, (6, 2, 2, 3)), (1, 2, 3, 0))
    expected = tf.nn.conv2d_transpose(inputs, kernel, (2, 10, 8, 3), 2, padding="VALID") + layer.bias
    np.testing.assert_allclose(layer(inputs), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_crop_and_its_gradient_are_those_of_keras(dtype: str) -> None:
    rng = np.random.default_rng(0)
    inputs, upstream = (tf.cast(rng.normal(size=shape), dtype) for shape in ((2, 9, 7, 3), (2, 5, 3, 3)))
    found = []
    for layer in (CentreCrop(2, dtype=dtype), tf.keras.layers.Cropping2D(2, dtype=dtype)):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            cropped = layer(inputs)
        found.append((cropped, tape.gradient(cropped, inputs, upstream)))
    for ours, theirs in zip(*found):
        np.testing.assert_array_equal(tf.cast(ours, tf.float32), tf.cast(theirs, tf.float32))


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    first, second, other = (build_unet(2, seed=seed).get_weights() for seed in (1, 1, 2))
    for left, right, third in zip(first, second, other):
        np.testing.assert_array_equal(left, right)
        assert left.ndim == 1 or np.abs(left - third).max() > 0


def test_he_initialisation_keeps_the_logits_moderate() -> None:
    """Variance is kept through all 23 layers; a factor of 2 per up-convolution would show as 4 in the deviation."""
    image = np.random.default_rng(0).uniform(-1, 1, (1, 252, 252, 1)).astype(np.float32)
    deviations = [float(np.std(build_unet(16, seed=seed)(image))) for seed in range(4)]
    assert 0.1 < float(np.median(deviations)) < 2.5


def test_dropout_follows_the_window_and_not_the_batch() -> None:
    first = tf.Variable(7, dtype=tf.int64)
    layer = WindowDropout(0.5, 3, first)
    ones = tf.ones((2, 6, 6, 4))
    together = layer(ones, training=True).numpy()
    first.assign(8)
    np.testing.assert_array_equal(layer(ones[:1], training=True).numpy()[0], together[1])
    assert np.abs(together[0] - together[1]).max() > 0
    assert set(np.unique(together)) == {0.0, 2.0}
    assert 0.3 < (together == 0).mean() < 0.7
    np.testing.assert_array_equal(layer(ones, training=False), ones)


def test_a_saved_model_of_diverged_weights_is_not_written(tmp_path: Path) -> None:
    model = build_unet(2)
    model.get_layer("up0_conv2").bias.assign([float("nan"), 0.0])
    with pytest.raises(TrainError, match=r"model is not written.*up0_conv2/bias:0 has values that are not numbers"):
        write_saved_model(model, tmp_path / "saved_model")
    model.get_layer("up0_conv2").bias.assign([5e5, 0.0])
    with pytest.raises(TrainError, match="beyond 65504"):
        write_saved_model(model, tmp_path / "saved_model")
    assert list(tmp_path.iterdir()) == []


def test_saved_model_serves_raw_pixels(tmp_path: Path) -> None:
    model = build_unet(2, precision="mixed_bfloat16")
    write_saved_model(model, tmp_path / "saved_model")
    loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
    image = np.random.default_rng(0).integers(0, 256, (1, 188, 204, 1), np.uint8)
    probability = loaded.signatures["serving_default"](image=tf.constant(image))["probability"]
    logits = loaded.signatures["network"](image=tf.constant(image.astype(np.float32) / 127.5 - 1))["logits"]
    assert probability.dtype == tf.float16
    assert probability.shape == (1, 4, 20, 1)
    np.testing.assert_allclose(probability[..., 0], tf.nn.softmax(logits)[..., 1], atol=1e-3)
    # Whatever precision it was trained in, it is saved in float32.
    exact = build_unet(2)
    exact.set_weights(model.get_weights())
    np.testing.assert_allclose(logits, exact(image.astype(np.float32) / 127.5 - 1), atol=1e-6)
