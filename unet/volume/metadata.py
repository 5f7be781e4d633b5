"""What a TIFF stack says of itself beside its pixels, pixel size, unit and axes, and how a copy says the same."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree

import tifffile

from unet.errors import warn

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    import numpy.typing as npt

# The display range, `min` and `max`, belongs to the input's intensities and is not kept.
_IMAGEJ_KEYS = ("spacing", "unit", "yunit", "zunit", "xorigin", "yorigin", "zorigin", "finterval", "fps")
_OME_KEYS = (
    *(f"PhysicalSize{axis}{suffix}" for axis in "XYZ" for suffix in ("", "Unit")),
    *("TimeIncrement", "TimeIncrementUnit"),
)
_IMAGEJ_AXES = "TZC"


_TIFF_UNITS = {2: "inch", 3: "cm"}
# A resolution coarser than this, in a plain file, is that of a printer or a screen.
_PRINTED_NM = 1e4
_NANOMETRES = {
    **dict.fromkeys(("pm", "picometer"), 1e-3),
    **dict.fromkeys(("å", "a", "angstrom", "ångström"), 0.1),
    **dict.fromkeys(("nm", "nanometer", "nanometre", "nanometers"), 1.0),
    **dict.fromkeys(("um", "µm", "μm", "\\u00b5m", "micron", "microns", "micrometer", "micrometre"), 1e3),
    **dict.fromkeys(("mm", "millimeter", "millimetre"), 1e6),
    **dict.fromkeys(("cm", "centimeter", "centimetre"), 1e7),
    **dict.fromkeys(("m", "meter", "metre"), 1e9),
    "inch": 2.54e7,
}


def _nanometres(size: object, unit: object) -> float | None:
    """A size in nanometres; None where it has none, or an unknown unit."""
    try:
        return _positive(size) * _NANOMETRES[str(unit).strip().lower()]
    except (ValueError, KeyError):
        return None


@dataclass(frozen=True)
class StackMetadata:
    """The tags that a file written from another one keeps.

    Attributes:
        flavour: "imagej", "ome", "shaped" (tifffile's own JSON description) or "tiff".
        resolution: pixels per unit along x and y, or None.
        resolution_unit: TIFF's code of that unit: 1 none, 2 inch, 3 centimetre.
        axes: letters of the axes that the pages count through, slowest first, as in "Z" or "TZ"; empty if not known.
        lengths: how many steps each of these has; their product is the number of pages.
        extra: ImageJ's own entries (spacing, unit ...), OME's pixel sizes, or the JSON description's entries.
        description: a plain TIFF's description, or None.
    """

    flavour: str = "tiff"
    resolution: tuple[float, float] | None = None
    resolution_unit: int = 1
    axes: str = ""
    lengths: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    description: str | None = None

    @property
    def pages(self) -> int:
        """The number of pages that the axes count through; 0 if they are not known."""
        return math.prod(self.lengths) if self.lengths else 0

    @property
    def pixel_size_nm(self) -> tuple[float | None, float | None, float | None]:
        """Depth, height and width of a pixel in nanometres; None for what is not known."""
        if self.flavour == "ome":
            z, y, x = (
                _nanometres(self.extra.get(f"PhysicalSize{axis}"), self.extra.get(f"PhysicalSize{axis}Unit", "µm"))
                for axis in "ZYX"
            )
            return z, y, x
        unit = self.extra.get("unit") if self.flavour == "imagej" else _TIFF_UNITS.get(self.resolution_unit)
        steps = (None, None) if self.resolution is None else (1 / self.resolution[1], 1 / self.resolution[0])
        y, x = (_nanometres(step, unit) for step in steps)
        if self.flavour != "imagej" and (x is None or x > _PRINTED_NM):
            y = x = None
        z = _nanometres(self.extra.get("spacing"), unit) if self.flavour == "imagej" else None
        return z, y, x

    def channel_of(self, page: int) -> int:
        """Which channel a page shows, from 0 on; 0 where the axes name none."""
        if "C" not in self.axes:
            return 0
        place = self.axes.index("C")
        return page // math.prod(self.lengths[place + 1 :]) % self.lengths[place]


def typical_pixel_nm(sizes: Iterable[Sequence[float | None]]) -> float | None:
    """The side of a pixel in its slice, the median over stacks of (depth, height, width); None if not known."""
    sides = [math.sqrt(size[1] * size[2]) for size in sizes if len(size) == 3 and size[1] and size[2]]
    return statistics.median(sides) if sides else None


class Described(Protocol):
    """An open volume, as far as a file that is written like it needs to know it."""

    metadata: StackMetadata
    pages: int


def read_metadata(tiff: tifffile.TiffFile, path: Path, axes: str, lengths: tuple[int, ...]) -> StackMetadata:
    """The metadata of an open file whose slices count through ``axes``.

    What cannot be understood is left out, with one line to the user: pixels decide, metadata never stops a run.
    """
    page = tiff.pages.first
    drop = partial(_leave_out, path)
    resolution, unit = _resolution(page, drop)
    try:
        if tiff.is_ome:
            return StackMetadata("ome", resolution, unit, axes, lengths, _ome_sizes(tiff.ome_metadata or "", drop))
        if tiff.is_imagej:
            found = tiff.imagej_metadata or {}
            kept = {key: found[key] for key in _IMAGEJ_KEYS if key in found}
            return StackMetadata("imagej", resolution, unit, axes, lengths, kept)
        if tiff.is_shaped and tiff.shaped_metadata:
            own = dict(tiff.shaped_metadata[0])
            for key in ("shape", "truncated", "axes"):
                own.pop(key, None)
            return StackMetadata("shaped", resolution, unit, axes, lengths, own)
        if tiff.is_stk or axes not in ("Q", "Z"):
            return StackMetadata("ome", resolution, unit, axes, lengths, _stk_sizes(tiff))
        return StackMetadata("tiff", resolution, unit, axes, lengths, description=page.description or None)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        drop("description", str(error))
        return StackMetadata("tiff", resolution, unit, axes, lengths)


def _leave_out(path: Path, what: str, value: object) -> None:
    warn(f"the {what} of {path} cannot be understood ({value}): it is left out")


def _resolution(page: Any, drop: Callable[[str, object], None]) -> tuple[tuple[float, float] | None, int]:
    """Pixels per unit along x and y, and TIFF's code of the unit."""
    tags = page.tags
    if "XResolution" not in tags or "YResolution" not in tags:
        return None, 1
    values = tags["XResolution"].value, tags["YResolution"].value
    try:
        per_unit = [_quotient(value) for value in values]
        unit = int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 1
    except (ZeroDivisionError, TypeError, ValueError, IndexError):
        per_unit, unit = [0.0, 0.0], 1
    # Beyond these a TIFF tag has no room for them.
    if not all(2**-31 < value < 2**31 for value in per_unit):
        if any(value not in ((0, 0), (0, 1)) for value in values):
            drop("resolution", values)
        return None, 1
    if unit not in (1, 2, 3):
        drop("unit of the resolution", unit)
        unit = 1
    return (per_unit[0], per_unit[1]), unit


def describe(
    kept: StackMetadata,
    pages: int,
    shape: tuple[int, int],
    dtype: np.dtype[Any] | npt.DTypeLike,
    samples: int = 1,
) -> str | None:
    """The description of a whole file of ``pages`` slices that keeps ``kept``; None if it has none.

    Args:
        kept: metadata of the file it is written from.
        pages: slices in the new file, as many or not.
        shape: rows and columns of each.
        dtype: of its pixels.
        samples: 1 for grey, 3 for colour.
    """
    if kept.flavour == "tiff":
        return kept.description
    if kept.pages == pages:
        axes, lengths = kept.axes, kept.lengths
    elif pages == 1 and not kept.lengths:
        axes, lengths = "", ()  # one slice that is no stack
    else:
        axes, lengths = ("Z" if len(kept.axes) != 1 else kept.axes), (pages,)
    colour = samples > 1
    whole = (*lengths, *shape, samples) if colour else (*lengths, *shape)
    plane = "YXS" if colour else "YX"
    if kept.flavour == "imagej":
        described = _imagej_description(kept, axes, lengths, shape, colour=colour)
        # ImageJ reads ASCII and writes a micrometre so.
        return "".join(letter if letter.isascii() else f"\\u{ord(letter):04X}" for letter in described)
    if kept.flavour == "shaped":
        named = {"axes": f"{axes}{plane}"} if axes and set(axes) - set("QI") else {}
        return json.dumps({"shape": whole, **named, **kept.extra})
    if set(axes) - set("TZC"):
        axes, lengths = "Z", (pages,)  # OME has no other name for what is counted
    whole = (*lengths, *shape, samples) if colour else (*lengths, *shape)
    document = tifffile.OmeXml()
    document.addimage(dtype, whole, (pages, 1, 1, *shape, samples), axes=f"{axes}{plane}", **kept.extra)
    text: str = document.tostring(declaration=True)
    return text


def _imagej_description(
    kept: StackMetadata, axes: str, lengths: tuple[int, ...], shape: tuple[int, int], *, colour: bool
) -> str:
    """ImageJ's words; where the slices are not in its own order of axes, they say in which."""
    if set(axes) - set(_IMAGEJ_AXES):
        axes, lengths = "Z", (math.prod(lengths),)
    steps = dict(zip(axes, lengths))
    usual = "".join(axis for axis in _IMAGEJ_AXES if axis in steps)
    extra = dict(kept.extra)
    if usual != axes:
        missing = "".join(axis for axis in _IMAGEJ_AXES if axis not in steps)
        extra["order"] = (missing + axes)[::-1].lower()
    whole = (*(steps[axis] for axis in usual), *shape, *((3,) if colour else ()))
    named = f"{usual}YX{'S' if colour else ''}"
    text: str = tifffile.tifffile.imagej_description(whole, axes=named, rgb=colour, **extra)
    return text


def _quotient(value: Any) -> float:
    """A tag's number: a fraction as it should be, or a floating-point number."""
    numbers = value if isinstance(value, tuple) else (value,)
    return float(numbers[0]) / float(numbers[1] if len(numbers) > 1 else 1)


def _stk_sizes(tiff: tifffile.TiffFile) -> dict[str, Any]:
    """The pixel sizes of a MetaMorph stack, as OME says them."""
    found = tiff.stk_metadata or {}
    if str(found.get("CalibrationUnits", "")).strip("\0 ").lower() not in ("um", "\u00b5m", "microns"):
        return {}
    sizes: dict[str, Any] = {}
    for axis in "XY":
        step = float(found.get(f"{axis}Calibration", 0))
        if step > 0:
            sizes.update({f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": "\u00b5m"})
    return sizes


def _ome_sizes(xml: str, drop: Callable[[str, object], None]) -> dict[str, Any]:
    """The pixel sizes of the first image of an OME-XML document."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError as error:
        drop("OME-XML", error)
        return {}
    sizes: dict[str, Any] = {}
    for element in root.iter():
        if element.tag.rsplit("}", 1)[-1] == "Pixels":
            for key in _OME_KEYS:
                value = element.attrib.get(key)
                if value is None:
                    continue
                try:
                    sizes[key] = value if key.endswith("Unit") else _positive(value)
                except ValueError:
                    drop(key, value)
            break
    return sizes


def _positive(text: object) -> float:
    value = float(str(text))
    if not 0 < value < math.inf:
        raise ValueError(text)
    return value
