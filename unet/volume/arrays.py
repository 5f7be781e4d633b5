"""Volumes whose format gives an array of named axes: Zarr, HDF5 and MRC."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.volume.limits import StackError
from unet.volume.metadata import StackMetadata
from unet.volume.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from unet.volume.limits import Limits

# Of a slab of slices that share their chunks, which is kept so that each chunk is decoded once.
_SLABS_BYTES = 2**28


class ArrayVolume(Volume):
    """Slices of an array; the axes besides y and x are counted through, the last fastest.

    Attributes:
        axes: names of the array's axes, in lower case.
        leading: lengths of the axes that are counted through.
    """

    def __init__(self, path: Path, array: Any, axes: Sequence[str], limits: Limits, chunks: Sequence[int]) -> None:
        """Check an array.

        Args:
            path: how a user names the volume.
            array: takes NumPy's basic indices and has a shape and a dtype.
            axes: a name for each of its axes, with y and x.
            limits: what is read.
            chunks: how many steps along each axis are stored together.

        Raises:
            StackError: if it is not of a kind that is read.
        """
        self.path, self._array, self._limits = path, array, limits
        self.axes = tuple(axes)
        shape = tuple(int(length) for length in array.shape)
        named = ", ".join(f"{axis} {length}" for axis, length in zip(self.axes, shape))
        if len(self.axes) != len(shape) or {"y", "x"} - set(self.axes) or min(shape) < 1:
            raise StackError(f"{path} has the axes {named or shape}: slices need rows y and columns x of some length")
        self._counted = [place for place, axis in enumerate(self.axes) if axis not in ("y", "x")]
        self.leading = tuple(shape[place] for place in self._counted)
        self.height, self.width = shape[self.axes.index("y")], shape[self.axes.index("x")]
        self.pages = math.prod(self.leading)
        self.dtype = np.dtype(array.dtype).newbyteorder("=")
        if self.dtype.name not in limits.dtypes:
            raise StackError(f"{path} has {self.dtype} pixels: convert it to {' or '.join(limits.dtypes)}")
        if self.pages > limits.max_pages or self.height * self.width > limits.max_pixels_per_page:
            raise StackError(f"{path} declares {named}, more than is read: cut it into smaller volumes")
        together = int(chunks[self._counted[-1]]) if self._counted else 1
        self._depth = max(1, min(together, _SLABS_BYTES // (self.height * self.width * self.dtype.itemsize)))
        self._slabs: dict[tuple[int, int, int], npt.NDArray[Any]] = {}

    def described(self, sizes: Mapping[str, Any]) -> StackMetadata:
        """Metadata with these axes and OME's pixel sizes."""
        letters = "".join(self.axes[place][:1].upper() for place in self._counted)
        return StackMetadata("ome", axes=letters or "Z", lengths=self.leading or (1,), extra=dict(sizes))

    def rows(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page``.

        Raises:
            IndexError: if there is no such slice.
            StackError: if a chunk cannot be read, or holds a value that is not a finite number where that matters.
        """
        self.check_page(page)
        slab = page - page % self.leading[-1] % self._depth if self.leading else 0
        try:
            found = self._slab(slab, row0, row1)[page - slab]
        except Exception as error:  # each codec fails in its own way
            raise StackError(self.fault(page, error)) from error
        if self._limits.finite and self.dtype.kind == "f" and not np.isfinite(found).all():
            raise StackError(f"slice {page} of {self.path} has values that are no finite numbers: write it again")
        return np.ascontiguousarray(found, self.dtype)

    def fault(self, page: int, error: Exception) -> str:
        """What is said of a slice that cannot be read."""
        return f"slice {page} of {self.path} is damaged ({error}): copy it again"

    def _slab(self, first: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows of the slices that share their chunks with slice ``first`` on, [D, R, width]."""
        key = (first, row0, row1)
        if key not in self._slabs:
            if self._slabs and next(iter(self._slabs))[0] != first:
                self._slabs.clear()  # before the next ones take their memory
            place = list(np.unravel_index(first, self.leading)) if self.leading else []
            count = min(self._depth, self.leading[-1] - int(place[-1])) if place else 1
            self._slabs[key] = self._read([int(step) for step in place], count, row0, row1)
        return self._slabs[key]

    def _read(self, place: list[int], count: int, row0: int, row1: int) -> npt.NDArray[Any]:
        index: list[Any] = [slice(None)] * len(self.axes)
        for axis, step in zip(self._counted, place):
            index[axis] = step
        if self._counted:
            index[self._counted[-1]] = slice(place[-1], place[-1] + count)
        index[self.axes.index("y")] = slice(row0, row1)
        found = np.asarray(self._array[tuple(index)])
        kept = [axis for axis in range(len(self.axes)) if isinstance(index[axis], slice)]
        order = [*self._counted[-1:], self.axes.index("y"), self.axes.index("x")]
        return found.transpose([kept.index(axis) for axis in order]).reshape(count, row1 - row0, self.width)
