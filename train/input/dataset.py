"""Training windows out of stacks of slices: which window a step sees depends on the seed and its number alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from train.input.augmentation import NO_AUGMENTATION, Augmentation, resample, sampling_map, shift_intensities
from unet.errors import UnetError, warn
from unet.geometry import output_size
from unet.intensity import WindowChoice, find_windows, normalise
from unet.volume import MASKS, LabelOptions, load_pair, open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    import tensorflow as tf

    from train.config import TrainConfig

TRAIN_IMAGES = "train-volume.tif"
TRAIN_LABELS = "train-labels.tif"
TEST_IMAGES = "test-volume.tif"
FOLDS = 5


class DataError(UnetError):
    """Training data that cannot be used."""


@dataclass(frozen=True)
class Slice:
    """One labelled slice: image uint8 [H, W]; label uint8 [H, W], 0 membrane, 1 not; cost float32 [H, W]."""

    name: str
    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    cost: npt.NDArray[np.float32]


def find_pairs(data_dir: str | Path) -> list[tuple[Path, Path]]:
    """The (images, labels) files under ``data_dir``: any number of `NAME-volume.tif` with `NAME-labels.tif`.

    A `test-volume.tif` is what `predict` segments and is left out.

    Raises:
        DataError: if there is none, or an images file has no labels file.
    """
    folder = Path(data_dir)
    images = sorted(path for path in folder.glob("*-volume.tif*") if not path.name.startswith("test-"))
    pairs = [(path, path.with_name(path.name.replace("-volume.", "-labels."))) for path in images]
    for path, labels in pairs:
        if not labels.exists():
            raise DataError(f"{path} has no labels: {labels} does not exist; put the label stack there")
    if not pairs:
        raise DataError(
            f"no training stack in {folder}: put {TRAIN_IMAGES} and {TRAIN_LABELS} there, name another folder with "
            "--data_dir, or make a synthetic stack with `python -m unet.phantom --out FOLDER`"
        )
    return pairs


def load_slices(
    pairs: Sequence[tuple[Path, Path]], options: LabelOptions = MASKS, window: WindowChoice = None
) -> list[tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
    """All labelled slices of several stacks as (name, image uint8 [H, W], label uint8 [H, W])."""
    loaded = []
    for images_path, labels_path in pairs:
        images, labels = load_pair(images_path, labels_path, options)
        with open_volume(images_path) as volume:
            windows = find_windows(volume, window)
        for note in windows.notes:
            warn(note)
        loaded += [
            (f"{images_path.name}[{page}]", windows.apply(page, image), label)
            for page, (image, label) in enumerate(zip(images, labels))
        ]
    return loaded


def fold_of(count: int, fold: int, folds: int = FOLDS) -> range:
    """The slices that fold ``fold`` holds out: consecutive ones, since neighbouring slices look alike."""
    return range(fold * count // folds, (fold + 1) * count // folds)


@dataclass(frozen=True)
class Windows:
    """The endless stream of training windows; window number i is the same whoever asks for it.

    Attributes:
        slices: what to cut from.
        size: input size of a window, 188 + 16k; its label is the central ``size - 184`` pixels.
        settings: how windows are deformed.
        seed: the stream's seed.
    """

    slices: Sequence[Slice]
    size: int
    settings: Augmentation
    seed: int

    def slice_index(self, number: int) -> int:
        """The slice of window ``number``: every slice once in each round, in a new order each round."""
        round_, place = divmod(number, len(self.slices))
        return int(np.random.default_rng([self.seed, 1, round_]).permutation(len(self.slices))[place])

    def window(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
        """Window ``number``: image float32 [size, size, 1] in [-1, 1]; label uint8 and cost float32 [out, out]."""
        rng = np.random.default_rng([self.seed, 2, number])
        chosen = self.slices[self.slice_index(number)]
        out = output_size(self.size)
        halo = (self.size - out) // 2
        centre = tuple(self._centre(side, out, rng) for side in chosen.image.shape)
        mapped = sampling_map(self.size, (centre[0], centre[1]), self.settings, rng)
        image = resample(normalise(chosen.image), mapped).astype(np.float32)
        inner = np.ascontiguousarray(mapped[:, halo : halo + out, halo : halo + out])
        label = resample(chosen.label, inner, nearest=True).astype(np.uint8)
        cost = resample(chosen.cost, inner, nearest=True).astype(np.float32)
        return shift_intensities(image, self.settings, rng)[..., np.newaxis], label, cost

    def _centre(self, side: int, out: int, rng: np.random.Generator) -> float:
        """A random centre, in pixels, whose output lies inside the slice where the slice is large enough."""
        free = side - out
        middle = (side - 1) / 2
        if free <= 0:
            return middle
        offset = rng.integers(0, free + 1) if not self.settings.rotation else rng.uniform(0, free)
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
        return numbers.map(cut, num_parallel_calls=threads).batch(batch_size, drop_remainder=True).prefetch(4)


def windows_of(config: TrainConfig, slices: Sequence[Slice]) -> Windows:
    """The training windows that a configuration asks for."""
    return Windows(slices, config.tile_size, Augmentation() if config.augment else NO_AUGMENTATION, config.seed)
