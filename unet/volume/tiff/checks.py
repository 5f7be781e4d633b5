"""What a TIFF file may declare to be read as a stack, checked before a pixel of it is decoded."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from unet.volume.limits import Limits, StackError
from unet.volume.tiff.segments import segment_height

# What tifffile raises on damaged headers, directories and tags.
DAMAGE = (
    *(tifffile.TiffFileError, IndexError, ValueError, KeyError, TypeError, AttributeError, struct.error),
    *(OSError, OverflowError, ZeroDivisionError, RuntimeError, MemoryError),
)
# Room is left for the directories, which are written behind the pixels.
CLASSIC_TIFF_BYTES = 2**32 - 2**25
_COLOURS = ("RGB", "PALETTE", "SEPARATED", "YCBCR", "CIELAB", "ICCLAB", "ITULAB")
_CLASSIC, _BIG = (b"II*\0", b"MM\0*"), (b"II+\0", b"MM\0+")
_NO_PAGES = tuple(magic + bytes(4) for magic in _CLASSIC)


def damaged(path: Path) -> StackError:
    """The error of a file that ends early or contradicts itself."""
    return StackError(f"{path} is truncated or damaged: copy or download it again")


def open_tiff(path: Path) -> tifffile.TiffFile:
    """Open a TIFF file.

    Raises:
        StackError: if it is missing, a folder, unreadable, empty, or no TIFF.
    """
    if path.is_dir():
        raise StackError(f"{path} is a folder: name a TIFF file in it")
    try:
        with path.open("rb") as stream:
            start = stream.read(16)
        if start[:8] in _NO_PAGES or (start[:4] in _BIG and start[8:] == bytes(8)):
            raise StackError(f"{path} has no pages: save the stack again")
        return tifffile.TiffFile(path)
    except FileNotFoundError as error:
        raise StackError(f"{path} does not exist: check the name") from error
    except PermissionError as error:
        raise StackError(f"{path} cannot be read: you have no permission to") from error
    except DAMAGE as error:
        if not start:
            raise StackError(f"{path} is empty: copy or download it again") from error
        if start[:4] in (*_CLASSIC, *_BIG):
            raise damaged(path) from error
        raise StackError(f"{path} is not a TIFF file: convert it to a TIFF stack of grey slices") from error


def check_page(path: Path, index: int, page: Any, limits: Limits) -> None:
    """Refuse a page by what it declares.

    Raises:
        StackError: if it is in colour, not two-dimensional, too large, or in a pixel format or compression not read.
    """
    where = f"page {index} of {path}"
    photometric = getattr(page.photometric, "name", str(page.photometric))
    if page.samplesperpixel != 1 or photometric in _COLOURS:
        raise StackError(f"{where} {limits.in_colour}")
    height, width = int(page.imagelength), int(page.imagewidth)
    if min(height, width) < 1 or page.imagedepth != 1:
        raise StackError(f"{where} is not a plain two-dimensional image: save the stack as slices")
    if height * width > limits.max_pixels_per_page:
        raise StackError(
            f"{where} declares {height} x {width} pixels, more than the {limits.max_pixels_per_page} that are read: "
            "cut the slices into smaller ones"
        )
    at_once = max(width, int(page.tilewidth)) * segment_height(page)
    if page.compression != 1 and at_once > limits.max_pixels_at_once:
        raise StackError(
            f"{where} has compressed strips or tiles of {at_once} pixels in a row, more than the "
            f"{limits.max_pixels_at_once} that are decoded at once: save it uncompressed, or in smaller tiles"
        )
    if page.dtype is None or page.bitspersample not in (1, 8 * np.dtype(page.dtype).itemsize):
        raise StackError(f"{where} has packed {page.bitspersample}-bit pixels: convert the stack to 8- or 16-bit grey")
    kind = str(np.dtype(page.dtype))
    if kind not in limits.dtypes:
        raise StackError(f"{where} has {kind} pixels: convert the stack to {' or '.join(limits.dtypes)}")
    if page.compression not in tifffile.TIFF.DECOMPRESSORS:
        raise unreadable_compression(where, page)


def unreadable_compression(where: str, page: Any) -> StackError:
    """The error of a page whose compression no installed library undoes."""
    name = getattr(page.compression, "name", str(page.compression))
    return StackError(
        f"{where} is compressed with {name}: save the stack uncompressed, or `pip install imagecodecs` to read it"
    )


def declared_pages(tiff: tifffile.TiffFile, path: Path, limits: Limits) -> tuple[int, bool]:
    """How many slices the file has, and whether all but the first lie behind it without directories of their own.

    ImageJ writes stacks of more than 4 GB in that form, and tifffile's ``truncate`` any.

    Raises:
        StackError: if there are too many, or fewer directories than the description speaks of.
    """
    first = tiff.pages.first
    found, declared, alone = len(tiff.pages), 1, False
    if tiff.is_imagej:
        declared = _number((tiff.imagej_metadata or {}).get("images", 1))
        alone = found == 1 and declared > 1
    elif tiff.is_shaped and tiff.shaped_metadata:
        own = tiff.shaped_metadata[0]
        shape = tuple(int(length) for length in own.get("shape", ()))
        # Only a first series that is this stack counts: pages appended later have their own description.
        if len(shape) > 2 and shape[-2:] == (first.imagelength, first.imagewidth):
            declared = int(np.prod(shape[:-2], dtype=object))
            alone = found == 1 and bool(own.get("truncated"))
    pages = declared if alone else found
    if pages > limits.max_pages:
        raise StackError(f"{path} declares {pages} pages, more than the {limits.max_pages} that are read: split it")
    if pages < max(1, declared) or goes_on(tiff, path):
        raise damaged(path)
    return pages, alone


def _number(value: Any) -> int:
    """A number of slices in a description; 1 where it is none."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return 1


def goes_on(tiff: tifffile.TiffFile, path: Path) -> bool:
    """Whether the last directory points to another that could not be read, or ends before it says."""
    layout = tiff.tiff
    with path.open("rb") as stream:
        stream.seek(tiff.pages[-1].offset)
        count = struct.unpack(layout.tagnoformat, stream.read(layout.tagnosize))[0]
        stream.seek(count * layout.tagsize, os.SEEK_CUR)
        raw = stream.read(layout.offsetsize)
    return len(raw) < layout.offsetsize or any(raw)
