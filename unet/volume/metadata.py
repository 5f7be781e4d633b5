"""What a TIFF stack says of itself beside its pixels, pixel size, unit and axes, and how a copy says the same."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol
from xml.etree import ElementTree

import tifffile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

# The display range, `min` and `max`, belongs to the input's intensities and is not kept.
_IMAGEJ_KEYS = ("spacing", "unit", "yunit", "zunit", "xorigin", "yorigin", "zorigin", "finterval", "fps")
_OME_KEYS = (
    *(f"PhysicalSize{axis}{suffix}" for axis in "XYZ" for suffix in ("", "Unit")),
    *("TimeIncrement", "TimeIncrementUnit"),
)
# In ImageJ's order, the only one it knows.
_IMAGEJ_AXES = "TZC"


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

    def channel_of(self, page: int) -> int:
        """Which channel a page shows, from 0 on; 0 where the axes name none."""
        if "C" not in self.axes:
            return 0
        place = self.axes.index("C")
        return page // math.prod(self.lengths[place + 1 :]) % self.lengths[place]


class Described(Protocol):
    """An open volume, as far as a file that is written like it needs to know it."""

    metadata: StackMetadata
    pages: int


def read_metadata(tiff: tifffile.TiffFile, pages: int) -> StackMetadata:
    """The metadata of an open file of ``pages`` slices."""
    page = tiff.pages.first
    resolution: tuple[float, float] | None = None
    if "XResolution" in page.tags and "YResolution" in page.tags:
        pairs = page.tags["XResolution"].value, page.tags["YResolution"].value
        if all(pair[0] and pair[1] for pair in pairs):
            resolution = (pairs[0][0] / pairs[0][1], pairs[1][0] / pairs[1][1])
    unit = int(page.tags["ResolutionUnit"].value) if "ResolutionUnit" in page.tags else 1
    if tiff.is_ome:
        return StackMetadata("ome", resolution, unit, *_leading_axes(tiff, pages), _ome_sizes(tiff.ome_metadata or ""))
    if tiff.is_imagej:
        found = tiff.imagej_metadata or {}
        kept = {key: found[key] for key in _IMAGEJ_KEYS if key in found}
        return StackMetadata("imagej", resolution, unit, *_imagej_axes(found, pages), kept)
    if tiff.is_shaped and tiff.shaped_metadata:
        own = dict(tiff.shaped_metadata[0])
        for key in ("shape", "truncated", "axes"):
            own.pop(key, None)
        return StackMetadata("shaped", resolution, unit, *_leading_axes(tiff, pages), own)
    return StackMetadata("tiff", resolution, unit, description=page.description or None)


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
        described: str = tifffile.tifffile.imagej_description(whole, axes=f"{axes}{plane}", rgb=colour, **kept.extra)
        # ImageJ reads ASCII and writes a micrometre so.
        return "".join(letter if letter.isascii() else f"\\u{ord(letter):04X}" for letter in described)
    if kept.flavour == "shaped":
        named = {"axes": f"{axes}{plane}"} if axes and set(axes) - set("QI") else {}
        return json.dumps({"shape": whole, **named, **kept.extra})
    document = tifffile.OmeXml()
    document.addimage(dtype, whole, (pages, 1, 1, *shape, samples), axes=f"{axes}{plane}", **kept.extra)
    text: str = document.tostring(declaration=True)
    return text


def _leading_axes(tiff: tifffile.TiffFile, pages: int) -> tuple[str, tuple[int, ...]]:
    """The axes before Y and X of the file's only series, if these count through its pages; else none."""
    series = tiff.series
    if len(series) == 1 and series[0].axes.endswith("YX"):
        lengths = tuple(int(length) for length in series[0].shape[:-2])
        if math.prod(lengths) == pages:
            return series[0].axes[:-2], lengths
    return ("Z", (pages,)) if tiff.is_ome else ("Q", (pages,))


def _imagej_axes(found: dict[str, Any], pages: int) -> tuple[str, tuple[int, ...]]:
    """ImageJ's axes of more than one step; a plain stack's are slices."""
    steps = {axis: int(found.get(key, 1)) for axis, key in zip(_IMAGEJ_AXES, ("frames", "slices", "channels"))}
    axes = "".join(axis for axis in _IMAGEJ_AXES if steps[axis] > 1)
    lengths = tuple(steps[axis] for axis in axes)
    return (axes, lengths) if axes and math.prod(lengths) == pages else ("Z", (pages,))


def _ome_sizes(xml: str) -> dict[str, Any]:
    """The pixel sizes of the first image of an OME-XML document."""
    try:
        root = ElementTree.fromstring(xml)
    except ElementTree.ParseError:
        return {}
    for element in root.iter():
        if element.tag.rsplit("}", 1)[-1] == "Pixels":
            return {
                key: element.attrib[key] if key.endswith("Unit") else float(element.attrib[key])
                for key in _OME_KEYS
                if key in element.attrib
            }
    return {}
