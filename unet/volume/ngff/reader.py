"""Zarr volumes: the full-resolution image of an OME-NGFF 0.4 or 0.5 multiscale, or a plain array, as slices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet.errors import warn
from unet.volume.arrays import ArrayVolume
from unet.volume.limits import IMAGE_LIMITS, StackError
from unet.volume.ngff.blosc import guard_blosc
from unet.volume.ngff.remote import MARKS, RemoteIdentity, check_reachable, remote_address, remote_fault, store_fault
from unet.volume.volume import FolderIdentity

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from unet.volume.limits import Limits

_NAMED = 6
UNITS = {"nanometer": "nm", "micrometer": "µm", "millimeter": "mm", "angstrom": "Å", "meter": "m", "picometer": "pm"}


def is_zarr(path: Path) -> bool:
    """Whether a folder is a Zarr group or array."""
    return path.is_dir() and any((path / name).exists() for name in MARKS)


def zarr_root(path: Path) -> Path:
    """The outermost folder of the Zarr hierarchy that a path lies in; itself if it lies in none."""
    inside = [folder for folder in (path, *path.parents) if is_zarr(folder)]
    return inside[-1] if inside else path


class ZarrStack(ArrayVolume):
    """A Zarr volume as a sequence of grey slices, read by blocks of rows.

    Attributes:
        multiscale: what an OME-Zarr image says of itself, axes and transformations of its first level included.
    """

    def __init__(self, path: str | os.PathLike[str], limits: Limits = IMAGE_LIMITS, inner: str = "") -> None:
        """Open and check a volume.

        Args:
            path: the folder of a group or an array, or its address in an object store.
            limits: what is read.
            inner: the place of an array or image inside it; by default the only one is found.

        Raises:
            StackError: if there is none that can be read, or several.
        """
        zarr = load_zarr()
        folder = Path(path)
        shown = Path(f"{folder}:/{inner}") if inner else folder
        address = remote_address(folder)
        if address:
            check_reachable(address)
        try:
            found = zarr.open(address or str(folder / inner), mode="r")
            if not hasattr(found, "shape"):
                found = _only_image(shown, found)
            self.multiscale, array = _multiscale(found)
            axes, sizes = _axis_names(shown, self.multiscale["axes"]), _sizes(self.multiscale)
        except StackError:
            raise
        except Exception as error:  # zarr's own, and those of a folder that says nothing or nonsense
            if address:
                raise StackError(remote_fault(address, error)) from error
            raise StackError(f"{shown} is not a Zarr image that can be read ({error}): convert it again") from error
        self._address = address
        self._identity: FolderIdentity | RemoteIdentity = (
            RemoteIdentity(f"{address}/{array.path}".rstrip("/"), array)
            if address
            else FolderIdentity(folder / inner / array.path)
        )
        super().__init__(shown, array, axes, limits, array.chunks)
        self.metadata = self.described(sizes)

    def fingerprint(self) -> dict[str, Any]:
        """A SHA-256, in hexadecimal, over names, sizes and times of the first level's files; of objects also ETags."""
        return self._identity.fingerprint()

    def changed(self) -> bool:
        """Whether a chunk was written, added or removed since ``fingerprint`` was first asked for."""
        return self._identity.changed()

    def fault(self, page: int, error: Exception) -> str:
        """What is said of a slice that cannot be read; a store may be the reason."""
        return (self._address and store_fault(self._address, error)) or super().fault(page, error)

    def close(self) -> None:
        """Nothing is held open."""


def _only_image(path: Path, group: Any) -> Any:
    """The image that a group is, or the only image or array in it."""
    if _multiscales(group):
        return group
    images = [one for _, one in group.groups() if _multiscales(one)] or [
        one for _, one in group.arrays() if len(one.shape) >= 2
    ]
    if len(images) == 1:
        return images[0]
    place = f"{remote_address(path) or f'{path}:'}/"
    named = ", ".join(sorted(str(one.path) for one in images)[:_NAMED])
    if not images:
        raise StackError(f"{path} has neither an OME-Zarr image nor an array: name its place, as in {place}PLACE")
    raise StackError(f"{path} holds {len(images)} images ({named}): name one, as in {place}{images[0].path}")


def _multiscales(group: Any) -> list[Any]:
    """The multiscale images in a group's attributes; version 0.5 keeps them under "ome"."""
    attributes = dict(group.attrs)
    return list(attributes.get("ome", attributes).get("multiscales", ()))


def _multiscale(found: Any) -> tuple[dict[str, Any], Any]:
    """What an image says of itself and its first level; for a plain array the same with names of our own."""
    if hasattr(found, "shape"):
        count = len(found.shape)
        names = ["y", "x"] if count == 2 else [f"axis{axis}" for axis in range(count - 3)] + ["z", "y", "x"]
        return {"axes": [{"name": name} for name in names], "datasets": [{"path": "0"}]}, found
    multiscale = dict(_multiscales(found)[0])
    array = found[str(multiscale["datasets"][0]["path"])]
    axes = multiscale.get("axes") or "tczyx"[-len(array.shape) :]  # the first versions had these five alone
    multiscale["axes"] = [{"name": axis} if isinstance(axis, str) else dict(axis) for axis in axes]
    first = dict(multiscale["datasets"][0])
    first["coordinateTransformations"] = _fitting(first.get("coordinateTransformations"), len(array.shape))
    multiscale["datasets"] = [first]
    return multiscale, array


def _fitting(transformations: Any, count: int) -> list[dict[str, Any]]:
    """The scale and the translation that have a positive or any number for each of so many axes."""
    kept = []
    for one in transformations if isinstance(transformations, list) else ():
        kind = one.get("type") if isinstance(one, dict) else None
        steps = one.get(kind) if kind in ("scale", "translation") else None
        if not isinstance(steps, list) or len(steps) != count:
            continue
        if all(isinstance(step, (int, float)) and (kind == "translation" or step > 0) for step in steps):
            kept.append(one)
    return kept


def _axis_names(path: Path, axes: list[dict[str, Any]]) -> list[str]:
    """The axes' names, in lower case; the last two of space are y and x, whatever they are called."""
    names = [str(axis["name"]).lower() for axis in axes]
    if {"y", "x"} <= set(names):
        return names
    if len(axes) >= 2 and all(axis.get("type", "space") == "space" for axis in axes[-2:]):
        warn(f"{path} has the axes {', '.join(names)}: the last two are taken for rows and columns")
        return [*names[:-2], "y", "x"]
    return names


def _sizes(multiscale: Mapping[str, Any]) -> dict[str, Any]:
    """The pixel sizes, as OME's XML names them."""
    sizes: dict[str, Any] = {}
    scales = multiscale["datasets"][0].get("coordinateTransformations", ())
    scale = next((one["scale"] for one in scales if one["type"] == "scale"), ())
    for axis, step in zip(multiscale["axes"], scale):
        name, unit = str(axis["name"]).lower(), str(axis.get("unit") or "")
        if name in ("x", "y", "z") and unit and 0 < float(step) < math.inf:
            key = f"PhysicalSize{name.upper()}"
            sizes[key], sizes[f"{key}Unit"] = float(step), UNITS.get(unit, unit)
    return sizes


def load_zarr() -> Any:
    """The zarr package.

    Raises:
        StackError: if it is not installed, or too old.
    """
    try:
        import zarr
    except ImportError as error:
        raise StackError("zarr is not installed: pip install 'unet-medical-triton[zarr]'") from error
    if int(zarr.__version__.split(".")[0]) < 3:
        raise StackError(f"zarr {zarr.__version__} is too old: pip install 'unet-medical-triton[zarr]'")
    guard_blosc()
    return zarr
