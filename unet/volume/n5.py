"""N5 volumes, as Paintera, BigDataViewer and Fiji write them: one data set as slices."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.errors import warn
from unet.files import read_json
from unet.volume.arrays import ArrayVolume
from unet.volume.limits import IMAGE_LIMITS, StackError
from unet.volume.volume import FolderIdentity

if TYPE_CHECKING:
    from unet.volume.limits import Limits

# N5 keeps a folder's own words in this file.
_WORDS = "attributes.json"
# What says how pixels are stored; other words may be nonsense and never stop a run.
_NEEDED = ("dimensions", "dataType", "blockSize", "compression", "compressionType")
_NAMED = 6
# A pyramid's full resolution is s0, smaller levels are s1, s2 ...
_LEVEL = re.compile(r"s\d+")


def is_n5(path: Path) -> bool:
    """Whether a folder is an N5 group or data set."""
    return path.is_dir() and (path / _WORDS).is_file()


def n5_root(path: Path) -> Path:
    """The outermost N5 folder that a path lies in; itself if it lies in none."""
    inside = [folder for folder in (path, *path.parents) if is_n5(folder)]
    return inside[-1] if inside else path


class _Pixels:
    """A data set with NumPy's order of axes; N5 names the fastest one first."""

    def __init__(self, store: Any) -> None:
        self._store = store.T
        self.shape = tuple(int(length) for length in self._store.shape)
        self.dtype = np.dtype(store.dtype.numpy_dtype)
        self.chunks = tuple(int(length) for length in self._store.chunk_layout.read_chunk.shape)

    def __getitem__(self, index: tuple[Any, ...]) -> npt.NDArray[Any]:
        try:
            return np.asarray(self._store[index].read().result())
        except ValueError as error:
            raise ValueError(_short(error)) from error


class N5Stack(ArrayVolume):
    """A data set of an N5 folder as a sequence of grey slices, read by blocks of rows."""

    def __init__(self, path: Path, limits: Limits = IMAGE_LIMITS, inner: str = "") -> None:
        """Open and check a volume.

        Args:
            path: the folder of a group or a data set.
            limits: what is read.
            inner: the data set's place in it; by default the only one, or the usual one, is found.

        Raises:
            StackError: if there is none that can be read, or several.
        """
        tensorstore = _load_tensorstore()
        shown = Path(f"{path}:/{inner}") if inner else path
        folder = _dataset(path, inner, limits)
        words = _words_of(folder)
        try:
            pixels = _Pixels(_open(tensorstore, folder, words))
        except Exception as error:  # tensorstore's own, and those of words that are nonsense
            raise StackError(f"{shown} is not N5 that can be read ({_short(error)}): convert it again") from error
        axes = _axes(shown, words, len(pixels.shape))
        super().__init__(shown, pixels, axes, limits, pixels.chunks)
        self.metadata = self.described(_sizes(shown, folder, words, axes))
        self._identity = FolderIdentity(folder)

    def fingerprint(self) -> dict[str, Any]:
        """A SHA-256, in hexadecimal, over names, sizes and times of the data set's files."""
        return self._identity.fingerprint()

    def changed(self) -> bool:
        """Whether a block was written, added or removed since ``fingerprint`` was first asked for."""
        return self._identity.changed()

    def close(self) -> None:
        """Nothing is held open."""


def _open(tensorstore: Any, folder: Path, words: dict[str, Any]) -> Any:
    """The data set as tensorstore reads it, with only the needed words of its own."""
    context = tensorstore.Context()
    place = {"driver": "memory", "path": "words"}
    needed = {key: words[key] for key in _NEEDED if key in words}
    tensorstore.KvStore.open(place, context=context).result().write("", json.dumps(needed)).result()
    blocks = {"base": {"driver": "file", "path": f"{folder.resolve()}/"}}
    layers = [blocks, {"exact": _WORDS, "base": place}]
    store = {"driver": "n5", "kvstore": {"driver": "kvstack", "layers": layers}}
    return tensorstore.open(store, context=context, open=True, read=True).result()


def _short(error: Exception) -> str:
    """What tensorstore says, without places in its source."""
    return str(error).partition(" [source locations")[0].replace("\n", " ")


def _words_of(folder: Path) -> dict[str, Any]:
    try:
        words = read_json(folder / _WORDS)
    except (OSError, ValueError):
        return {}
    return words if isinstance(words, dict) else {}


def _dataset(path: Path, inner: str, limits: Limits) -> Path:
    """The folder of the data set that is named or meant."""
    start = path / inner
    found = sorted(_datasets(start))
    if len(found) == 1:
        return found[0]
    usual = [folder for folder in found if folder.relative_to(start).as_posix() in limits.usual]
    usual += [folder for folder in found if folder.parent.relative_to(path).as_posix() in limits.usual]
    if usual:
        return usual[0]
    places = [folder.relative_to(path).as_posix() for folder in (found or sorted(_datasets(path)))]
    if not places:
        raise StackError(f"{path} has no N5 data set in it: name the folder that has one")
    named = ", ".join(f"/{place}" for place in places[:_NAMED]) + (" ..." if len(places) > _NAMED else "")
    fault = "does not say which data set is meant" if found else f"has no data set {inner}"
    raise StackError(f"{path} {fault}: name one of {named} behind the folder, as in {path}:/{places[0]}")


def _datasets(start: Path) -> list[Path]:
    """The folders of the data sets below one, of a pyramid the full resolution alone."""
    found = []
    for name, below, _ in os.walk(start):
        folder = Path(name)
        dimensions = _words_of(folder).get("dimensions")
        if isinstance(dimensions, list):
            below.clear()  # its blocks, which may be millions
            if len(dimensions) >= 2:
                found.append(folder)
    return [
        one
        for one in found
        if one.name == "s0" or not _LEVEL.fullmatch(one.name) or one.with_name("s0") not in found or one == start
    ]


def _axes(path: Path, words: dict[str, Any], count: int) -> list[str]:
    """Names of the axes in NumPy's order; without own ones depth, rows and columns."""
    usual = [*(f"axis{axis}" for axis in range(count - 3)), "z", "y", "x"][-count:]
    own = words.get("axes")
    if own is None:
        return usual
    names = [str(axis).lower() for axis in reversed(own)] if isinstance(own, list) else []
    if len(names) == count and len(set(names)) == count and {"y", "x"} <= set(names):
        return names
    warn(f"the axes of {path} cannot be understood ({own}): they are left out")
    return usual


def _sizes(path: Path, folder: Path, words: dict[str, Any], axes: list[str]) -> dict[str, Any]:
    """The pixel sizes: N5 Viewer's `pixelResolution` of the data set or its pyramid, or `resolution` with `units`."""
    own = words.get("pixelResolution") or _words_of(folder.parent).get("pixelResolution")
    steps, units = words.get("resolution"), words.get("units")
    if own is not None:
        steps, units = (own.get("dimensions"), own.get("unit")) if isinstance(own, dict) else (own, None)
    if steps is None or units is None:
        return {}  # numbers without a unit say nothing
    space = [axis for axis in reversed(axes) if axis in ("x", "y", "z")]
    every = units if isinstance(units, list) else [units] * len(steps) if isinstance(steps, list) else []
    whole = isinstance(steps, list) and len(steps) == len(every) and len(steps) in (len(axes), len(space))
    names = list(reversed(axes)) if whole and len(steps) == len(axes) else space
    sizes: dict[str, Any] = {}
    for axis, step, unit in zip(names, steps, every) if whole else ():
        if axis in space and isinstance(step, (int, float)) and 0 < step < np.inf and isinstance(unit, str):
            sizes.update({f"PhysicalSize{axis.upper()}": float(step), f"PhysicalSize{axis.upper()}Unit": unit})
    if len(sizes) != 2 * len(space):
        warn(f"the pixel size of {path} cannot be understood ({steps} {units}): it is left out")
        return {}
    return sizes


def _load_tensorstore() -> Any:
    try:
        import tensorstore
    except ImportError as error:
        raise StackError("tensorstore is not installed: pip install 'unet-medical-triton[n5]'") from error
    return tensorstore
