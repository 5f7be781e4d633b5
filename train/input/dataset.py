"""Training windows out of stacks of slices: which window a step sees depends on the seed and its number alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from train.input.augmentation import NO_AUGMENTATION, Augmentation, change_intensities, resample, sampling_map
from unet.geometry import gather, mirrored_indices, output_size
from unet.intensity import normalise
from unet.volume import NOT_ANNOTATED

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tensorflow as tf

    from train.config import TrainConfig
    from train.input.store import Slice

# Tries to find a place in a partly annotated slice where the label has an annotated pixel.
_TRIES = 50
# Pixels around what a window reads, for the interpolation.
_MARGIN_PX = 2
# Larger slices are never brought to float32 whole.
_WHOLE_SLICE_PX = 2**20


@dataclass(frozen=True)
class Windows:
    """The endless stream of training windows; window number i is the same whoever asks for it.

    Attributes:
        slices: what to cut from.
        size: input size of a window, 188 + 16k; its label is the central ``size - 184`` pixels.
        settings: how windows are deformed.
        seed: the stream's seed.
        membrane_weight: cost of an error on a membrane pixel; other pixels cost 1.
    """

    slices: Sequence[Slice]
    size: int
    settings: Augmentation
    seed: int
    membrane_weight: float = 1.0

    def slice_index(self, number: int) -> int:
        """The slice of window ``number``: every slice once in each round, in a new order each round."""
        round_, place = divmod(number, len(self.slices))
        return int(np.random.default_rng([self.seed, 1, round_]).permutation(len(self.slices))[place])

    def window(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Window ``number``: image float32 [size, size, 1] in [-1, 1]; label uint8 and cost float32 [out, out].

        The cost is 0 where the label is not annotated, and the label is then 255.
        """
        rng = np.random.default_rng([self.seed, 2, number])
        chosen = self.slices[self.slice_index(number)]
        out = output_size(self.size)
        halo = (self.size - out) // 2
        exact = rng.random() < self.settings.exact
        centre = self._centre(chosen, out, rng, exact=exact)
        mapped = sampling_map(self.size, centre, self.settings, rng, exact=exact)
        image = _read(chosen.image, mapped, brightness=True).astype(np.float32)
        inner = np.ascontiguousarray(mapped[:, halo : halo + out, halo : halo + out])
        label = _read(chosen.label, inner).astype(np.uint8)
        cost = np.where(label == 0, np.float32(self.membrane_weight), np.float32(1))
        if chosen.border is not None:
            cost += _read(chosen.border, inner)
        cost[label == NOT_ANNOTATED] = 0
        chosen.release()
        return change_intensities(image, self.settings, rng)[..., np.newaxis], label, cost

    def _centre(self, chosen: Slice, out: int, rng: np.random.Generator, *, exact: bool) -> tuple[float, float]:
        """A random centre, in pixels, whose undeformed label has an annotated pixel; see `_place`."""
        height, width = chosen.label.shape
        for _ in range(_TRIES):
            row, col = self._place(height, out, rng, exact=exact), self._place(width, out, rng, exact=exact)
            top, left = max(0, int(row - out / 2)), max(0, int(col - out / 2))
            if (chosen.label[top : top + out, left : left + out] != NOT_ANNOTATED).any():
                break
        return row, col

    def _place(self, side: int, out: int, rng: np.random.Generator, *, exact: bool) -> float:
        """A random centre on one axis whose output lies inside the slice if the slice is large enough.

        An exact one is midway between two pixels, as the window's own middle is.
        """
        free = side - out
        middle = (side - 1) / 2
        if free <= 0:
            return middle - (side % 2) / 2 if exact else middle
        offset = rng.integers(0, free + 1) if exact else rng.uniform(0, free)
        return float(middle + offset - free / 2)

    def batches(self, first: int, batch_size: int, stride: int, threads: int = 1) -> tf.data.Dataset:
        """An endless dataset of batches (images, labels, costs).

        Args:
            first: number of the first window.
            batch_size: windows in a batch, numbered consecutively.
            stride: from the first window of a batch to the first of the next: the global batch, so that ranks which
                start at ``rank * batch_size`` share the stream without overlap.
            threads: windows cut at the same time.
        """
        import tensorflow as tf

        out = output_size(self.size)
        shapes = ((self.size, self.size, 1), (out, out), (out, out))

        def cut(number: tf.Tensor) -> tuple[tf.Tensor, ...]:
            arrays = tf.numpy_function(lambda n: self.window(int(n)), [number], (tf.float32, tf.uint8, tf.float32))
            for array, shape in zip(arrays, shapes):
                array.set_shape(shape)
            return tuple(arrays)

        numbers = tf.data.Dataset.range(first, np.iinfo(np.int64).max, stride).flat_map(
            lambda start: tf.data.Dataset.range(start, start + batch_size)
        )
        # Nothing is left to tune, and the thread that would tune sleeps by the wall clock: a run whose clock was set
        # back waited at its end until the clock had caught up.
        options = tf.data.Options()
        options.autotune.enabled = False
        batches = numbers.map(cut, num_parallel_calls=threads).batch(batch_size, drop_remainder=True)
        return batches.prefetch(4).with_options(options)


def _read(plane: npt.NDArray[Any], mapped: npt.NDArray[np.float32], *, brightness: bool = False) -> npt.NDArray[Any]:
    """Read a plane [H, W] through a sampling map, of a large plane no more than the map touches.

    Args:
        plane: of a slice.
        mapped: float32 [2, size, size], rows and columns.
        brightness: whether these are intensities, which become [-1, 1] and are read bilinearly, not by the nearest.
    """
    if plane.size > _WHOLE_SLICE_PX:
        axes = []
        for axis, side in zip(mapped, plane.shape):
            first = int(np.floor(axis.min())) - _MARGIN_PX
            axes.append((first, mirrored_indices(first, int(np.ceil(axis.max())) + _MARGIN_PX + 1 - first, side)))
        (top, rows), (left, cols) = axes
        touched = plane[rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
        plane = gather(touched, rows - rows.min(), cols - cols.min())
        mapped = mapped - np.array([top, left], np.float32)[:, np.newaxis, np.newaxis]
    if plane.dtype == np.float16:  # which OpenCV does not read
        plane = plane.astype(np.float32)
    return resample(normalise(plane) if brightness else plane, mapped, nearest=not brightness)


def windows_of(config: TrainConfig, slices: Sequence[Slice]) -> Windows:
    """The training windows that a configuration asks for."""
    settings = Augmentation() if config.augment else NO_AUGMENTATION
    return Windows(slices, config.tile_size, settings, config.seed, config.membrane_weight)
