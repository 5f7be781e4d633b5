"""HDF5 volumes, as CREMI, ilastik and Fiji write them: one data set as slices."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unet.errors import warn
from unet.files import parse_json
from unet.volume.arrays import ArrayVolume
from unet.volume.limits import IMAGE_LIMITS, LABEL_LIMITS, StackError
from unet.volume.volume import FileIdentity

if TYPE_CHECKING:
    from collections.abc import Iterator

    from unet.volume.limits import Limits

_MAGIC = b"\x89HDF\r\n\x1a\n"
_NAMED = 6
# More steps than this along the last of four axes are columns and not channels.
_MOST_CHANNELS = 4


def is_hdf5(start: bytes) -> bool:
    """Whether a file that begins so is HDF5."""
    return start.startswith(_MAGIC)


def has_pair(path: Path) -> bool:
    """Whether a file is HDF5 with images and labels where CREMI keeps them."""
    try:
        with path.open("rb") as stream:
            if not is_hdf5(stream.read(len(_MAGIC))):
                return False
        with _load_h5py().File(path, "r", locking=False) as file:
            return all(limits.usual[0] in file for limits in (IMAGE_LIMITS, LABEL_LIMITS))
    except OSError:
        return False


class Hdf5Stack(ArrayVolume):
    """A data set of an HDF5 file as a sequence of grey slices, read by blocks of rows."""

    def __init__(self, path: Path, limits: Limits = IMAGE_LIMITS, inner: str = "") -> None:
        """Open and check a volume.

        Args:
            path: the file.
            limits: what is read.
            inner: the data set's place in it; by default the only one, or the usual one, is found.

        Raises:
            StackError: if there is none that can be read, or several.
        """
        h5py = _load_h5py()
        with _damage(path):
            self._file = h5py.File(path, "r", locking=False)
        try:
            with _damage(path):
                data = _dataset(h5py, path, self._file, inner, limits)
                _require_own_pixels(path, self._file, data)
                shown = Path(f"{path}:/{inner}") if inner else path
                axes = _axes(shown, data)
                super().__init__(shown, data, axes, limits, data.chunks or (1,) * len(data.shape))
                self.metadata = self.described(_sizes(shown, data, axes))
        except BaseException:
            self._file.close()
            raise
        self._identity = FileIdentity(path)

    def fingerprint(self) -> dict[str, Any]:
        """The file's size and SHA-256, and the data set's place."""
        return {**self._identity.fingerprint(), "place": str(self._array.name)}

    def changed(self) -> bool:
        """Whether the file was written to or replaced since it was opened."""
        return self._identity.changed()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """What HDF5 makes of a damaged file: an error of many kinds, from whichever part of it is asked for."""
    try:
        yield
    except StackError:
        raise
    except Exception as error:
        raise StackError(f"{path} is truncated or damaged ({error}): copy or download it again") from error


def _dataset(h5py: Any, path: Path, file: Any, inner: str, limits: Limits) -> Any:
    """The data set that is named or meant."""
    if inner:
        found = file.get(inner)
        if not isinstance(found, h5py.Dataset):
            raise StackError(f"{path} has no data set {inner}: {_named(h5py, file)}")
        return found
    candidates = _candidates(h5py, file)
    if len(candidates) == 1:
        return file[candidates[0]]
    usual = [name for name in limits.usual if name in candidates]
    if usual:
        return file[usual[0]]
    raise StackError(f"{path} does not say which data set is meant: {_named(h5py, file)}")


def _require_own_pixels(path: Path, file: Any, data: Any) -> None:
    """Refuse pixels of other files: nobody would notice that those change, and a file may name any as its own."""
    others = [source.file_name for source in data.virtual_sources()] if data.is_virtual else []
    others += [name for name, *_ in data.external or ()]
    others += [data.file.filename] if data.file.filename != file.filename else []
    # "." is HDF5's word for the file itself.
    others = [str(other) for other in others if str(other) != "."]
    if others:
        raise StackError(f"{path} takes pixels from {others[0]}: name that file, or copy them into one data set")


def _candidates(h5py: Any, file: Any) -> list[str]:
    found: list[str] = []

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and len(item.shape) >= 2 and item.dtype.kind in "uifb":
            found.append(name)

    file.visititems(visit)
    return found


def _named(h5py: Any, file: Any) -> str:
    names = [f"/{name}" for name in _candidates(h5py, file)]
    if not names:
        return "it has no array of numbers"
    more = " ..." if len(names) > _NAMED else ""
    return f"name one of {', '.join(names[:_NAMED])}{more} behind the file, as in FILE:{names[0]}"


def _axes(path: Path, data: Any) -> list[str]:
    """Names of the axes, from ilastik's tags where there are some; else depth, rows and columns."""
    count = len(data.shape)
    try:
        names = [str(axis["key"]).lower() for axis in parse_json(data.attrs["axistags"])["axes"]]
        if len(names) == count and {"y", "x"} <= set(names):
            return names
        warn(f"the axis tags of {path} cannot be understood: they are left out")
    except KeyError:
        pass
    except (ValueError, TypeError) as error:
        warn(f"the axis tags of {path} cannot be understood ({error}): they are left out")
    if count > 3 and data.shape[-1] <= _MOST_CHANNELS:
        raise StackError(
            f"{path} has an array of {' x '.join(str(length) for length in data.shape)} without axis tags, whose last "
            "axis looks like channels: save one channel as depth x rows x columns"
        )
    return [*(f"axis{axis}" for axis in range(count - 3)), "z", "y", "x"][-count:]


def _sizes(path: Path, data: Any, axes: list[str]) -> dict[str, Any]:
    """The pixel sizes: CREMI's `resolution` is in nanometres, Fiji's `element_size_um` in micrometres."""
    space = [axis for axis in axes if axis in ("z", "y", "x")]
    for key, unit in (("resolution", "nm"), ("element_size_um", "µm")):
        if key not in data.attrs:
            continue
        try:
            steps = [float(step) for step in np.ravel(data.attrs[key])][-len(space) :]
            if len(steps) == len(space) and all(0 < step < np.inf for step in steps):
                sizes: dict[str, Any] = {}
                for axis, step in zip(space, steps):
                    sizes.update({f"PhysicalSize{axis.upper()}": step, f"PhysicalSize{axis.upper()}Unit": unit})
                return sizes
        except (TypeError, ValueError):
            pass
        warn(f"the {key} of {path} cannot be understood ({data.attrs[key]}): it is left out")
    return {}


def _load_h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise StackError("h5py is not installed: pip install 'unet-medical-triton[hdf5]'") from error
    return h5py
