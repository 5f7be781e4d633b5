"""Where a TIFF file's slices lie and how they are counted, by the words of the program that wrote it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tifffile

from unet.errors import warn
from unet.volume.limits import Limits, StackError
from unet.volume.tiff.checks import DAMAGE, damaged, declared_pages, goes_on

# Files whose slices are in another order, number or place than their directories.
_RESOLVED = ("ome", "stk", "lsm", "mmstack", "ndtiff", "scanimage", "fluoview")
# ImageJ counts its axes in this order unless it says so; from the fastest to the slowest, as it writes it.
_IMAGEJ_ORDER = "czt"
_IMAGEJ_COUNTS = {"T": "frames", "Z": "slices", "C": "channels"}
_NAMED_IMAGES = 4


@dataclass(frozen=True)
class Layout:
    """Where the slices are.

    Attributes:
        directories: the number of the directory of each slice, in the slices' order; one where ``together``.
        together: all slices lie behind each other from the first directory's pixels on.
        pages: number of slices.
        axes: letters of the axes that the slices count through, slowest first.
        lengths: steps of each; their product is ``pages``. A slice that is no stack has neither.
    """

    directories: tuple[int, ...]
    together: bool
    pages: int
    axes: str
    lengths: tuple[int, ...]


def layout_of(tiff: tifffile.TiffFile, path: Path, limits: Limits) -> Layout:
    """The layout of an open file.

    Raises:
        StackError: if it holds several images, too many slices, or fewer than its directories point to.
    """
    if any(getattr(tiff, f"is_{kind}") for kind in _RESOLVED):
        found = _resolved(path, limits)
        if found is not None:
            if goes_on(tiff, path):
                raise damaged(path)
            return found
    pages, together = declared_pages(tiff, path, limits)
    axes: str = "Q"
    lengths: tuple[int, ...] = (pages,)
    if tiff.is_ome:
        axes = "Z"
    elif tiff.is_imagej:
        axes, lengths = _imagej_axes(tiff, pages)
    elif tiff.is_shaped:
        axes, lengths = _shaped_axes(tiff, pages)
    return Layout((0,) if together else tuple(range(pages)), together, pages, axes, lengths)


def _resolved(path: Path, limits: Limits) -> Layout | None:
    """The layout by tifffile's own reading of other programs' words; None where these cannot be understood."""
    try:
        # A file of its own: this reading replaces pages by shorthands that do not say all that is checked.
        with tifffile.TiffFile(path) as other:
            images = [one for one in other.series if not getattr(one.keyframe, "is_reduced", False)]
            if not images or any(one.kind in ("generic", "uniform") for one in images):
                warn(f"{path} is described in words that cannot be understood: its slices are taken as they lie in it")
                return None
            if len(images) > 1:
                raise StackError(_several(path, images))
            return _of_series(path, other, images[0], limits)
    except StackError:
        raise
    except DAMAGE:
        warn(f"{path} is described in words that cannot be understood: its slices are taken as they lie in it")
        return None


def _of_series(path: Path, tiff: tifffile.TiffFile, series: Any, limits: Limits) -> Layout:
    axes, shape = series.get_axes(squeeze=False), series.get_shape(squeeze=False)
    leading = [(axis, int(length)) for axis, length in zip(axes, shape) if axis not in "YXS"]
    declared = math.prod(length for _, length in leading)
    if declared > limits.max_pages:
        raise StackError(f"{path} declares {declared} pages, more than the {limits.max_pages} that are read: split it")
    counted = [(axis, length) for axis, length in leading if length > 1]
    letters, lengths = "".join(axis for axis, _ in counted), tuple(length for _, length in counted)
    if series.kind == "stk":
        return Layout((0,), True, declared, letters, lengths)
    own = [page.index for page in series.pages if page is not None and page.parent.filehandle.name == path.name]
    if not own or not all(isinstance(index, int) for index in own):
        raise damaged(path)
    if len(own) < declared:
        elsewhere = sum(page is not None for page in series.pages) - len(own)
        files = f", {elsewhere} are in other files" if elsewhere else ""
        warn(f"{path} describes {declared} slices and has {len(own)} of them{files}: only these are read")
        letters, lengths = "Z", (len(own),)
    left = len(tiff.pages) - len(set(own))
    if left and not any(getattr(page, "is_reduced", False) for page in tiff.pages):
        warn(f"{path} has {left} pages that its description does not speak of: they are left out")
    return Layout(tuple(own), False, len(own), letters, lengths)


def _several(path: Path, images: list[Any]) -> str:
    named = ", ".join(
        f"{one.name or index} of {' x '.join(str(length) for length in one.shape)}"
        for index, one in enumerate(images[:_NAMED_IMAGES])
    )
    more = " ..." if len(images) > _NAMED_IMAGES else ""
    return f"{path} holds {len(images)} images ({named}{more}): save the one to read as a file of its own"


def _imagej_axes(tiff: tifffile.TiffFile, pages: int) -> tuple[str, tuple[int, ...]]:
    """ImageJ's axes of more than one step, in the order in which the file counts them; a plain stack's are slices."""
    found = tiff.imagej_metadata or {}
    order = str(found.get("order", _IMAGEJ_ORDER)).lower()
    if sorted(order) != sorted(_IMAGEJ_ORDER):
        order = _IMAGEJ_ORDER
    try:
        steps = {axis: int(found.get(key, 1)) for axis, key in _IMAGEJ_COUNTS.items()}
    except (TypeError, ValueError):
        steps = {}
    axes = "".join(axis for axis in reversed(order.upper()) if steps.get(axis, 1) > 1)
    lengths = tuple(steps[axis] for axis in axes)
    return (axes, lengths) if axes and math.prod(lengths) == pages else ("Z", (pages,))


def _shaped_axes(tiff: tifffile.TiffFile, pages: int) -> tuple[str, tuple[int, ...]]:
    """The axes in tifffile's own description."""
    own: dict[str, Any] = dict(tiff.shaped_metadata[0]) if tiff.shaped_metadata else {}
    shape = own.get("shape", ())
    lengths = tuple(int(length) for length in shape[:-2])
    if len(shape) < 2 or math.prod(lengths) != pages:
        return "Q", (pages,)
    axes = str(own.get("axes", ""))[:-2]
    return (axes if len(axes) == len(lengths) else "Q" * len(lengths)), lengths
