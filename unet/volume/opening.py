"""Any volume that can be read, opened by what it is and not by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import tifffile

from unet.volume.folder import FolderStack, is_pattern, is_picture, is_tiff, place_of
from unet.volume.hdf5 import Hdf5Stack, is_hdf5
from unet.volume.limits import IMAGE_LIMITS, Limits, StackError
from unet.volume.mrc import MrcStack, is_mrc
from unet.volume.n5 import N5Stack, is_n5, n5_root
from unet.volume.ngff.reader import ZarrStack, is_zarr, load_zarr, zarr_root
from unet.volume.ngff.remote import remote_address
from unet.volume.overlay import SOFTWARE
from unet.volume.tiff.reader import StackReader

if TYPE_CHECKING:
    from unet.volume.volume import Volume

_START_BYTES = 212
_INNER = ":/"


def open_volume(path: str | os.PathLike[str], limits: Limits = IMAGE_LIMITS) -> Volume:
    """Open a volume of any format that is read.

    Args:
        path: a TIFF, HDF5 or MRC file, a Zarr or N5 folder, a folder or a pattern of files of one slice each;
            ``:/PLACE`` behind it names an array inside an HDF5 file, a Zarr or an N5 folder. Of a Zarr volume also an
            address, as s3://...
        limits: what it may declare.

    Raises:
        StackError: if it cannot be read, or declares something unfit.
    """
    if remote_address(Path(path)):
        return ZarrStack(path, limits)
    outer, inner = split_inner(Path(path))
    if outer.is_dir():
        if is_zarr(outer):
            return ZarrStack(outer, limits, inner)
        if is_n5(outer):
            return N5Stack(outer, limits, inner)
        return FolderStack(outer, limits)
    if is_pattern(outer):
        return FolderStack(outer, limits)
    start = _start_of(outer)
    if is_hdf5(start):
        return Hdf5Stack(outer, limits, inner)
    if inner:
        raise StackError(
            f"{outer} is neither an HDF5 file nor a Zarr or N5 folder: {_INNER}{inner} names no place in it"
        )
    if is_mrc(start):
        return MrcStack(outer, limits)
    return FolderStack(outer, limits) if is_picture(start) else StackReader(outer, limits)


def split_inner(path: Path) -> tuple[Path, str]:
    """A file or folder and the place inside it that ``:/`` names, or ""."""
    outer, mark, inner = str(path).partition(_INNER)
    if not mark or path.exists() or not Path(outer).exists():
        return path, ""
    return Path(outer), inner.strip("/")


def beside(path: Path) -> tuple[Path, str]:
    """The folder where what is made of a volume is written, never inside it, and the file name that it would have.

    An array inside a file or folder is named by both; of a volume elsewhere this is the working directory.
    """
    if remote_address(path):
        return Path.cwd(), path.name
    outer, inner = split_inner(path)
    if is_pattern(outer):
        outer = place_of(outer)
        if str(outer) == ".":
            outer = Path.cwd()
    root = n5_root(zarr_root(outer))
    if root != outer:
        inner = outer.relative_to(root).as_posix() + (f"/{inner}" if inner else "")
    place = inner.rsplit("/", 1)[-1]
    if not place:
        if is_n5(root):
            return root.parent, f"{root.stem}.tif"
        is_folder = root.is_dir() and not is_zarr(root)
        return root.parent, f"{root.name}.tif" if is_folder else root.name
    stem, ending = root.name, ""
    for known in (".ome.zarr", ".zarr"):
        if stem.lower().endswith(known):
            stem, ending = stem[: -len(known)], ".zarr"
            break
    else:
        stem = Path(stem).stem
    return root.parent, f"{stem}-{place}{ending or '.tif'}"


def _start_of(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(_START_BYTES)
    except OSError:
        return b""  # the reader of TIFF says what is wrong


def is_volume(path: Path) -> bool:
    """Whether what a pattern matches looks like a volume; hidden files and unfinished results do not."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return is_zarr(path) or is_n5(path)
    start = _start_of(path)
    return is_hdf5(start) or is_mrc(start) or is_picture(start) or is_tiff(start)


def holds_slices(path: Path) -> bool:
    """Whether a file holds one slice, so that it is one of a stack's."""
    start = _start_of(path)
    if not is_tiff(start):
        return is_picture(start)
    try:
        with tifffile.TiffFile(path) as tiff:
            return len(tiff.pages) == 1 and len(tiff.series) == 1 and len(tiff.series[0].shape) == 2
    except Exception:  # its reader will say what is wrong
        return False


def made_here(path: Path) -> bool:
    """Whether this program wrote a file or Zarr folder."""
    try:
        if is_zarr(path):
            return "made_by" in dict(load_zarr().open(str(path), mode="r").attrs.get("unet", {}))
        start = _start_of(path)
        if is_tiff(start):
            with tifffile.TiffFile(path) as tiff:
                return str(tiff.pages.first.software).startswith(SOFTWARE)
        if is_picture(start):
            from PIL import Image

            with Image.open(path) as picture:
                return str(picture.info.get("Software", "")).startswith(SOFTWARE)
    except Exception:  # its reader will say what is wrong
        return False
    return False
