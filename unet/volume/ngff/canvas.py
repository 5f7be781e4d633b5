"""OME-Zarr volumes out: NGFF 0.5 with a pyramid, written by blocks of rows in any order."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.files import fsync, naming
from unet.volume.ngff.reader import load_zarr

if TYPE_CHECKING:
    from unet.volume.ngff.reader import ZarrStack

_CHUNK_COLUMNS = 4096
# A level of the pyramid is half as large as the one before, down to this side.
_SMALLEST_PX = 512
_STRIP_PX = 2**22


class ZarrCanvas:
    """An OME-Zarr volume like another one, written by blocks of rows in any order.

    It is an image for viewers from the start: smaller levels of a slice follow with ``finish_page``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        like: ZarrStack,
        dtype: npt.DTypeLike,
        *,
        chunk_rows: int,
        notes: dict[str, Any] | None = None,
        labels_of: str | None = None,
        keep: bool = False,
    ) -> None:
        """Make the volume, in place of whatever is at ``path``.

        Args:
            path: the folder.
            like: whose shape, axes and pixel size to keep.
            dtype: of the pixels.
            chunk_rows: rows of a chunk; blocks that begin and end at chunks may be written by several processes.
            notes: kept in the group's attributes under "unet".
            labels_of: for ids of segments, the place of the image that they are of, as seen from ``path``.
            keep: open one that is there already instead.
        """
        zarr = load_zarr()
        self._path = Path(path)
        self._leading, self.dtype = like.leading, np.dtype(dtype)
        sides = [(like.height, like.width)]
        while max(sides[-1]) > _SMALLEST_PX:
            sides.append((-(-sides[-1][0] // 2), -(-sides[-1][1] // 2)))
        if keep and (Path(path) / "0" / "zarr.json").exists():
            group = zarr.open_group(str(path), mode="r+")
            self._levels = [group[str(level)] for level in range(len(sides))]
            return
        group = zarr.open_group(str(path), mode="w", zarr_format=3)
        source = {} if labels_of is None else {"image-label": {"source": {"image": labels_of}}}
        group.attrs["ome"] = {"version": "0.5", "multiscales": [_multiscale(like, len(sides))], **source}
        group.attrs["unet"] = notes or {}
        ones = (1,) * len(self._leading)
        rows = min(chunk_rows, like.height)
        self._levels = [
            group.create_array(
                str(level),
                shape=(*self._leading, height, width),
                chunks=(*ones, min(rows, height), min(_CHUNK_COLUMNS, width)),
                dtype=self.dtype,
                fill_value=0,
                dimension_names=[*_names(like)],
            )
            for level, (height, width) in enumerate(sides)
        ]

    def write(self, page: int, row0: int, rows: npt.NDArray[Any]) -> None:
        """Write rows from ``row0`` on of slice ``page``."""
        with naming(self._path):
            self._levels[0][self._block(page, row0, row0 + len(rows))] = rows

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page`` as they were written."""
        return np.asarray(self._levels[0][self._block(page, row0, row1)])

    def finish_page(self, page: int) -> None:
        """Write the smaller levels of a slice that is written whole: means of intensities, every second of labels."""
        for larger, smaller in zip(self._levels, self._levels[1:]):
            height = smaller.shape[-2]
            step = max(1, _STRIP_PX // larger.shape[-1] // 2)
            for row0 in range(0, height, step):
                row1 = min(height, row0 + step)
                fine = np.asarray(larger[self._block(page, 2 * row0, min(2 * row1, larger.shape[-2]))])
                with naming(self._path):
                    smaller[self._block(page, row0, row1)] = _halved(fine)

    def settle(self, page: int, row0: int, row1: int, *, levels: bool) -> None:
        """Have what was written of a slice on the disk: whole chunks of rows, and with ``levels`` the smaller levels.

        Raises:
            OSError: the disk is full or broken.
        """
        folder = Path("c", *(str(step) for step in self._place(page)))
        step = self._levels[0].chunks[-2]
        places = [self._path / "0" / folder / str(y) for y in range(row0 // step, -(-row1 // step))]
        if levels:
            places += [self._path / str(level) / folder for level in range(1, len(self._levels))]
        for place in places:
            for file in place.rglob("*"):
                if file.is_file():
                    with naming(file):
                        fsync(file)

    def _block(self, page: int, row0: int, row1: int) -> tuple[Any, ...]:
        """The index of rows of slice ``page``, counted through the axes before y and x."""
        return (*self._place(page), slice(row0, row1), slice(None))

    def _place(self, page: int) -> tuple[int, ...]:
        """Of slice ``page`` along the axes before y and x."""
        return tuple(int(step) for step in np.unravel_index(page, self._leading)) if self._leading else ()

    def close(self) -> None:
        """Nothing is held open."""


def _halved(plane: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A plane [H, W] at half its size; the last row or column of an odd one counts twice."""
    if plane.dtype.kind != "f":
        return plane[::2, ::2]
    filled = np.pad(plane, [(0, side % 2) for side in plane.shape], mode="edge")
    blocks = filled.reshape(filled.shape[0] // 2, 2, filled.shape[1] // 2, 2)
    return np.asarray(blocks.mean(axis=(1, 3), dtype=plane.dtype))


def _names(like: ZarrStack) -> list[str]:
    """The axes that the canvas has: those that are counted through, then y and x."""
    return [*(axis for axis in like.axes if axis not in ("y", "x")), "y", "x"]


def _multiscale(like: ZarrStack, levels: int) -> dict[str, Any]:
    """The image's own words, with the transformations of so many levels."""
    order = [like.axes.index(axis) for axis in _names(like)]
    axes = [{**like.multiscale["axes"][place], "name": like.axes[place]} for place in order]
    scale, shift = [1.0] * len(order), None
    for one in like.multiscale["datasets"][0].get("coordinateTransformations", ()):
        if one.get("type") == "scale":
            scale = [float(one["scale"][place]) for place in order]
        elif one.get("type") == "translation":
            shift = [float(one["translation"][place]) for place in order]
    datasets = []
    for level in range(levels):
        factors = [1] * (len(order) - 2) + [2**level] * 2
        steps: list[dict[str, Any]] = [{"type": "scale", "scale": [a * b for a, b in zip(scale, factors)]}]
        # The middle of a pixel of a smaller level lies between the middles of those that it is made of.
        moved = [a + b * (factor - 1) / 2 for a, b, factor in zip(shift or [0.0] * len(order), scale, factors)]
        if any(moved):
            steps.append({"type": "translation", "translation": moved})
        datasets.append({"path": str(level), "coordinateTransformations": steps})
    kept = {key: value for key, value in like.multiscale.items() if key in ("name", "coordinateTransformations")}
    return {**kept, "axes": axes, "datasets": datasets}
