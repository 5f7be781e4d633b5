"""A volume in another pixel size: its slices scaled for the network, and what was found of them scaled back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from unet.volume.volume import Volume

if TYPE_CHECKING:
    import scipy.sparse


class Planes(Protocol):
    """Whatever gives rows of slices."""

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page``."""


def scaling(source: int, target: int, first: int, stop: int) -> tuple[int, int, scipy.sparse.csr_array]:
    """How pixels ``first`` to ``stop`` of a line of ``target`` pixels are made of one of ``source`` pixels.

    Linear between the middles of two pixels where the line grows; where it shrinks, the mean over a triangle as wide as
    the pixel. Each pixel depends on its own weights alone, so that parts put together equal the whole.

    Returns:
        (first source pixel, one past the last, weights [stop - first, source pixels]).
    """
    import scipy.sparse

    step = source / target
    reach = max(1.0, step)
    middles = (np.arange(first, stop) + 0.5) * step - 0.5
    count = int(np.ceil(2 * reach)) + 1
    places = np.floor(middles - reach).astype(np.int64)[:, np.newaxis] + np.arange(count + 1)
    weights = np.maximum(0, 1 - np.abs(places - middles[:, np.newaxis]) / reach)
    weights /= weights.sum(axis=1, keepdims=True)
    places = np.clip(places, 0, source - 1)
    low, high = int(places.min()), int(places.max()) + 1
    lines = np.repeat(np.arange(stop - first), places.shape[1])
    matrix = scipy.sparse.coo_array((weights.ravel(), (lines, places.ravel() - low)), (stop - first, high - low))
    return low, high, matrix.tocsr()


class ScaledRows:
    """Rows of slices in another size, made from few rows of the original at a time."""

    def __init__(self, planes: Planes, original: tuple[int, int], size: tuple[int, int]) -> None:
        """Prepare.

        Args:
            planes: the original.
            original: rows and columns of its slices.
            size: rows and columns wanted.
        """
        self._planes, self._original, self._size = planes, original, size
        _, _, self._across = scaling(original[1], size[1], 0, size[1])

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[np.float32]:
        """Rows ``row0`` to ``row1`` of slice ``page`` in the size that is wanted, float32."""
        low, high, down = scaling(self._original[0], self._size[0], row0, row1)
        found = self._planes.read(page, low, high).astype(np.float64)
        return np.asarray((self._across @ (down @ found).T).T, np.float32)


class ScaledVolume(Volume):
    """A volume whose slices are brought to another size; pixels keep their format."""

    def __init__(self, original: Volume, height: int, width: int) -> None:
        """Scale the slices of an open volume to so many rows and columns."""
        self._original = original
        self.path, self.pages, self.dtype = original.path, original.pages, original.dtype
        self.height, self.width, self.metadata = height, width, original.metadata
        self._scaled = ScaledRows(self, (original.height, original.width), (height, width))

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows of the original slice ``page``."""
        return self._original.rows(page, row0, row1)

    def rows(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of the scaled slice ``page``; errors as those of the original."""
        found = self._scaled.read(page, row0, row1)
        return found.astype(self.dtype) if self.dtype.kind == "f" else np.rint(found).astype(self.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """That of the original."""
        return self._original.fingerprint()

    def changed(self) -> bool:
        """Whether the original has changed."""
        return self._original.changed()

    def close(self) -> None:
        """Close the original."""
        self._original.close()
