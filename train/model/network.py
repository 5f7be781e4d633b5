"""The U-Net of Ronneberger, Fischer and Brox (2015), https://arxiv.org/abs/1505.04597, as published.

Valid 3x3 convolutions with ReLU, 2x2 max pooling, 2x2 up-convolutions that halve the channels, skips cropped
to the size of the expanding path, dropout at the bottom, He initialisation, logits without an activation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import tensorflow as tf

from train.model.dropout import WindowDropout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LEVELS = 5
CLASSES = 2
# The names of the expanding path's layers start with these.
DECODER = ("up", "logits")


class UpConvolution(tf.keras.layers.Layer):
    """A 2x2 transposed convolution of stride 2, computed as a 1x1 convolution and depth-to-space.

    With a stride equal to its kernel each output pixel sees one input pixel, so both forms are the same
    function of the same number of parameters. This one exports to a graph without shape arithmetic when height
    and width are dynamic.

    Input [N, H, W, C], output [N, 2H, 2W, filters].
    """

    def __init__(self, filters: int, seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.filters = filters
        self.seed = seed

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Create the kernel [1, 1, C, 4 x filters] and the bias [filters]."""
        self.kernel = self.add_weight(
            name="kernel", shape=(1, 1, input_shape[-1], 4 * self.filters), initializer=_linear_initialiser(self.seed)
        )
        self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer="zeros")

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Apply the up-convolution."""
        # One bias per output channel, repeated for the four output pixels of an input pixel; added before
        # depth-to-space, so that inference engines fuse it into the convolution.
        spread = tf.nn.conv2d(inputs, self.kernel, strides=1, padding="VALID") + tf.tile(self.bias, [4])
        return tf.nn.depth_to_space(spread, 2)

    def get_config(self) -> dict[str, Any]:
        """The configuration from which Keras rebuilds the layer."""
        return {**super().get_config(), "filters": self.filters, "seed": self.seed}


class CentreCrop(tf.keras.layers.Layer):
    """Takes ``margin`` pixels from each side.

    Keras' own Cropping2D gives the same, but TensorFlow computes the gradient of its slice on one core, element by
    element: a sixth of a training step. Here that gradient is a padding.

    Input [N, H, W, C], output [N, H - 2 margin, W - 2 margin, C].
    """

    def __init__(self, margin: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.margin = margin

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        """Crop."""
        margin = self.margin

        @tf.custom_gradient
        def crop(tensor: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            sides = [[0, 0], [margin, margin], [margin, margin], [0, 0]]
            return tensor[:, margin:-margin, margin:-margin, :], lambda upstream: tf.pad(upstream, sides)

        return crop(inputs)

    def get_config(self) -> dict[str, Any]:
        """The configuration from which Keras rebuilds the layer."""
        return {**super().get_config(), "margin": self.margin}


def build_unet(
    base_filters: int = 64,
    dropout: float = 0.0,
    *,
    precision: str = "float32",
    seed: int = 0,
    first_window: tf.Variable | None = None,
) -> tf.keras.Model:
    """Build the network.

    Args:
        base_filters: filters of the first level; each of the four next levels doubles them.
        dropout: share of activations dropped at the two deepest contracting levels while training.
        precision: a Keras mixed-precision policy: "float32", "mixed_bfloat16" or "mixed_float16".
        seed: seed of the initial weights and of dropout.
        first_window: scalar int64, the number of the batch's first training window, which dropout's masks follow.

    Returns:
        A model from float32 [N, H, W, 1] in [-1, 1], H and W of 188 + 16k, to float32 logits
        [N, H - 184, W - 184, 2]; class 0 is membrane, class 1 is not.
    """
    seeds = iter(range(seed * 1000, seed * 1000 + 1000))
    window = tf.Variable(0, trainable=False, dtype=tf.int64) if first_window is None else first_window
    policy = tf.keras.mixed_precision.Policy(precision)
    image = tf.keras.Input((None, None, 1), name="image", dtype=tf.float32)
    tensor, skips = image, []
    for level in range(LEVELS):
        tensor = _convolve(tensor, base_filters << level, f"down{level}", seeds, policy)
        if level >= LEVELS - 2:
            tensor = WindowDropout(dropout, next(seeds), window, dtype=policy, name=f"dropout{level}")(tensor)
        if level < LEVELS - 1:
            skips.append(tensor)
            tensor = tf.keras.layers.MaxPool2D(dtype=policy, name=f"pool{level}")(tensor)
    for level in reversed(range(LEVELS - 1)):
        tensor = UpConvolution(base_filters << level, next(seeds), dtype=policy, name=f"up{level}_upconv")(tensor)
        skip = CentreCrop(_skip_crop(level), dtype=policy, name=f"up{level}_crop")(skips[level])
        tensor = tf.keras.layers.Concatenate(dtype=policy, name=f"up{level}_concat")([skip, tensor])
        tensor = _convolve(tensor, base_filters << level, f"up{level}", seeds, policy)
    head = _linear_initialiser(next(seeds))
    # The head computes in float32: the loss is taken from its logits.
    tensor = tf.keras.layers.Conv2D(CLASSES, 1, kernel_initializer=head, dtype=tf.float32, name="logits")(tensor)
    return tf.keras.Model(image, tensor, name="unet")


def _convolve(tensor: Any, filters: int, name: str, seeds: Iterator[int], policy: Any) -> Any:
    """Two valid 3x3 convolutions with ReLU."""
    for index in (1, 2):
        tensor = tf.keras.layers.Conv2D(
            filters,
            3,
            activation="relu",
            kernel_initializer=tf.keras.initializers.HeNormal(next(seeds)),
            dtype=policy,
            name=f"{name}_conv{index}",
        )(tensor)
    return tensor


def _linear_initialiser(seed: int | None = None) -> tf.keras.initializers.Initializer:
    """He et al. (2015), equation 7, for a layer that no ReLU follows: the variance is 1 / fan-in, not 2 / fan-in."""
    return tf.keras.initializers.VarianceScaling(1.0, "fan_in", "truncated_normal", seed)


def _skip_crop(level: int) -> int:
    """Pixels to crop from each side of a level's skip, derived from the sizes of the valid convolutions.

    Below a skip, each level takes 4 pixels on the way down and, except the deepest, 4 on the way up. Seen at ``level``,
    the pixels of the level k below count 2**k times. Half of the sum is cropped from each side.
    """
    depth = LEVELS - 1 - level
    lost = sum((4 << k) * (1 if k == depth else 2) for k in range(1, depth + 1))
    return lost // 2
