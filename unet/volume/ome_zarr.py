"""OME-Zarr volumes in and out: the full-resolution image of an OME-NGFF 0.4 multiscale, as a stack of slices."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.volume.limits import Limits, StackError
from unet.volume.metadata import StackMetadata
from unet.volume.volume import Volume

_CHUNK_COLUMNS = 4096


def is_zarr(path: Path) -> bool:
    """Whether a path is meant as a Zarr folder."""
    return path.is_dir() and any((path / name).exists() for name in (".zattrs", ".zgroup", ".zarray", "zarr.json"))


class ZarrStack(Volume):
    """An OME-Zarr volume as a sequence of grey slices, read by blocks of rows.

    Attributes:
        path: the folder.
        pages: number of slices; time points, channels and depths are counted through, the last fastest.
        height: rows of each.
        width: columns of each.
        dtype: of the pixels, in the machine's own byte order.
        metadata: pixel size and axes, as an OME-TIFF says them.
        multiscale: what the volume says of itself, for a copy of the first level.
        leading: lengths of the axes before y and x.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits | None = None) -> None:
        """Open and check a volume.

        Raises:
            StackError: if it is not one, or declares something unfit.
        """
        zarr = load_zarr()
        limits = limits or Limits()
        self.path = Path(path)
        try:
            group = zarr.open_group(str(self.path), mode="r")
            self.multiscale: dict[str, Any] = dict(group.attrs["multiscales"][0])
            self._name = str(self.multiscale["datasets"][0]["path"])
            self._array = group[self._name]
            axes = [axis if isinstance(axis, str) else str(axis["name"]) for axis in self.multiscale["axes"]]
        except Exception as error:  # zarr's own, and those of a folder that says nothing or nonsense
            raise StackError(
                f"{self.path} is not an OME-Zarr image (version 0.4) that can be read ({error}): convert it again"
            ) from error
        shape = tuple(int(length) for length in self._array.shape)
        if len(axes) != len(shape) or axes[-2:] != ["y", "x"] or min(shape) < 1:
            raise StackError(f"{self.path} has the axes {''.join(axes)}, which must end in y and x: convert it again")
        self.leading, (self.height, self.width) = shape[:-2], shape[-2:]
        self.pages = int(np.prod(self.leading, dtype=object))
        self.dtype: np.dtype[Any] = np.dtype(self._array.dtype).newbyteorder("=")
        if self.dtype.name not in limits.dtypes:
            raise StackError(f"{self.path} has {self.dtype} pixels: convert it to {' or '.join(limits.dtypes)}")
        if self.pages > limits.max_pages or self.height * self.width > limits.max_pixels_per_page:
            raise StackError(f"{self.path} declares {list(shape)} pixels, more than are read: cut it into smaller ones")
        self.metadata = self._metadata(axes)
        self._first_look: str | None = None

    def _metadata(self, axes: list[str]) -> StackMetadata:
        sizes: dict[str, Any] = {}
        try:
            scales = self.multiscale["datasets"][0]["coordinateTransformations"]
            scale = next(one["scale"] for one in scales if one["type"] == "scale")
            for axis, step in zip(self.multiscale["axes"], scale):
                if axis["name"] in "xyz" and axis.get("unit"):
                    key = f"PhysicalSize{axis['name'].upper()}"
                    sizes[key], sizes[f"{key}Unit"] = float(step), _UNITS.get(axis["unit"], axis["unit"])
        except (KeyError, StopIteration, TypeError, ValueError):
            sizes = {}
        letters = "".join(axis.upper() for axis in axes[:-2]) or "Z"
        return StackMetadata("ome", axes=letters, lengths=self.leading or (1,), extra=sizes)

    def rows(self, index: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``index``.

        Raises:
            IndexError: if there is no such slice.
            StackError: if a chunk cannot be read.
        """
        self.check_page(index)
        try:
            rows = self._array[_block(self.leading, index, row0, row1)]
        except Exception as error:  # each codec fails in its own way
            raise StackError(f"slice {index} of {self.path} is damaged ({error}): copy it again") from error
        return np.ascontiguousarray(rows, self.dtype)

    def fingerprint(self) -> dict[str, Any]:
        """A SHA-256, in hexadecimal, over names, sizes and times of the first level's files.

        The pixels themselves are not read: a volume may be larger than anyone wants to read twice.
        """
        self._first_look = self._first_look or self._look()
        return {"sha256": self._first_look}

    def changed(self) -> bool:
        """Whether a chunk was written, added or removed since ``fingerprint`` was first asked for."""
        return self._first_look is not None and self._look() != self._first_look

    def _look(self) -> str:
        digest = hashlib.sha256((self.path / self._name / ".zarray").read_bytes())
        for folder, names, files in sorted(os.walk(self.path / self._name)):
            names.sort()
            for name in sorted(files):
                about = Path(folder, name).stat()
                place = Path(folder, name).relative_to(self.path).as_posix()
                digest.update(f"{place}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def close(self) -> None:
        """Nothing is held open."""


_UNITS = {"nanometer": "nm", "micrometer": "µm", "millimeter": "mm", "angstrom": "Å", "meter": "m"}


class ZarrCanvas:
    """An OME-Zarr volume like another one, written by blocks of rows in any order."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        like: ZarrStack,
        dtype: npt.DTypeLike,
        *,
        chunk_rows: int,
        notes: dict[str, Any] | None = None,
        keep: bool = False,
    ) -> None:
        """Make the volume, in place of whatever is at ``path``.

        Args:
            path: the folder.
            like: whose shape, axes and pixel size to keep.
            dtype: of the pixels.
            chunk_rows: rows of a chunk; blocks that begin and end at chunks may be written by several processes.
            notes: kept in the group's attributes under "unet".
            keep: open one that is there already instead.
        """
        zarr = load_zarr()
        self._leading = like.leading
        if keep and (Path(path) / "0" / ".zarray").exists():
            self._array = zarr.open_group(str(path), mode="r+")["0"]
            return
        group = zarr.open_group(str(path), mode="w")
        dataset = {"path": "0"}
        first = like.multiscale["datasets"][0]
        if "coordinateTransformations" in first:
            dataset["coordinateTransformations"] = first["coordinateTransformations"]
        group.attrs["multiscales"] = [{**like.multiscale, "datasets": [dataset]}]
        group.attrs["unet"] = notes or {}
        ones = (1,) * len(like.leading)
        self._array = group.create_dataset(
            "0",
            shape=(*like.leading, like.height, like.width),
            chunks=(*ones, min(chunk_rows, like.height), min(_CHUNK_COLUMNS, like.width)),
            dtype=np.dtype(dtype),
            dimension_separator="/",
            fill_value=0,
        )

    def write(self, page: int, row0: int, rows: npt.NDArray[Any]) -> None:
        """Write rows from ``row0`` on of slice ``page``."""
        self._array[_block(self._leading, page, row0, row0 + len(rows))] = rows

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page`` as they were written."""
        return np.asarray(self._array[_block(self._leading, page, row0, row1)])

    def close(self) -> None:
        """Nothing is held open."""


def _block(leading: tuple[int, ...], page: int, row0: int, row1: int) -> tuple[Any, ...]:
    """The index of rows of slice ``page``, counted through the axes before y and x."""
    place = np.unravel_index(page, leading) if leading else ()
    return (*(int(step) for step in place), slice(row0, row1), slice(None))


def load_zarr() -> Any:
    """The zarr package.

    Raises:
        StackError: if it is not installed.
    """
    try:
        import zarr
    except ImportError as error:
        raise StackError("zarr is not installed: pip install 'unet-medical-triton[zarr]'") from error
    return zarr
