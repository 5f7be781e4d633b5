"""A folder, or a pattern of names, of files with one slice each: PNG, JPEG and TIFF, in natural order."""

from __future__ import annotations

import glob
import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from unet.errors import warn
from unet.volume.limits import IMAGE_LIMITS, Limits, StackError
from unet.volume.metadata import StackMetadata
from unet.volume.tiff.reader import StackReader
from unet.volume.volume import Volume

if TYPE_CHECKING:
    from PIL import Image as PilImage

_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Pillow's names of grey pixels: 8 bits, one bit, 16 bits in three spellings, 32 bits of either kind.
_GREY = ("L", "1", "I;16", "I;16B", "I;16L", "I", "F")
_NAMED = 3
_MOST_GAPS = 10_000


def is_picture(start: bytes) -> bool:
    """Whether a file that begins so is a PNG or JPEG."""
    return start.startswith(_PICTURES)


def is_tiff(start: bytes) -> bool:
    """Whether a file that begins so is a TIFF."""
    return start.startswith(_TIFFS)


def is_pattern(path: Path) -> bool:
    """Whether a path is a pattern of names and no file's own name."""
    return glob.has_magic(str(path)) and not path.exists()


def place_of(path: Path) -> Path:
    """The folder that a pattern's files lie in or below."""
    return next(folder for folder in path.parents if not glob.has_magic(str(folder)))


class FolderStack(Volume):
    """Files of one slice each as a sequence of grey slices; one of them is decoded at a time."""

    def __init__(self, path: Path, limits: Limits = IMAGE_LIMITS) -> None:
        """Open and check the files.

        Args:
            path: a folder, a pattern of names, or one picture.
            limits: what is read.

        Raises:
            StackError: if there are none, or they are not of one size and kind.
        """
        self.path, self._limits = path, limits
        self._files = _slices_in(path)
        if len(self._files) > limits.max_pages:
            raise StackError(f"{path} has {len(self._files)} files, more than the {limits.max_pages} that are read")
        looks = [_look_at(file, limits) for file in self._files]
        self.height, self.width, self.dtype = looks[0]
        self.pages = len(self._files)
        for file, look in zip(self._files, looks):
            if look != looks[0]:
                first, other = (f"{height} x {width} {dtype}" for height, width, dtype in (looks[0], look))
                raise StackError(
                    f"{path} is not a stack of equal slices: {self._files[0].name} is {first}, {file.name} is {other}: "
                    "keep slices of one size in a folder"
                )
        _say_gaps(path, self._files)
        self.metadata = self._metadata()
        self._first = self._stats()
        self._decoded: tuple[int, npt.NDArray[Any]] | None = None

    def _metadata(self) -> StackMetadata:
        """The pixel size of the first file, where it is a TIFF that says it."""
        sizes: dict[str, Any] = {}
        if is_tiff(_start_of(self._files[0])):
            with StackReader(self._files[0], self._limits) as first:
                for axis, step in zip("ZYX", first.metadata.pixel_size_nm):
                    if step is not None:
                        sizes.update({f"PhysicalSize{axis}": step, f"PhysicalSize{axis}Unit": "nm"})
        return StackMetadata("ome", axes="Z", lengths=(self.pages,), extra=sizes)

    def rows(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page``; the slice is kept until another one is asked for.

        Raises:
            IndexError: if there is no such slice.
            StackError: if the file cannot be decoded, or is in colour.
        """
        self.check_page(page)
        if self._decoded is None or self._decoded[0] != page:
            self._decoded = None  # before the next one takes its memory
            self._decoded = page, self._decode(self._files[page])
        return self._decoded[1][row0:row1]

    def _decode(self, file: Path) -> npt.NDArray[Any]:
        if is_tiff(_start_of(file)):
            with StackReader(file, self._limits) as reader:
                pixels = reader[0]
        else:
            pixels = _read_picture(file, self._limits)
        if pixels.shape != (self.height, self.width) or pixels.dtype != self.dtype:
            raise StackError(f"{file} was changed while {self.path} was read: read it again")
        if self._limits.finite and pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise StackError(f"{file} has values that are no finite numbers: write it again")
        return pixels

    def _stats(self) -> list[tuple[str, int, int]]:
        found = []
        for file in self._files:
            try:
                about = file.stat()
                found.append((file.name, about.st_size, about.st_mtime_ns))
            except FileNotFoundError:
                found.append((file.name, -1, -1))
        return found

    def fingerprint(self) -> dict[str, Any]:
        """A SHA-256, in hexadecimal, over the files' names, sizes and times."""
        return {"files": self.pages, "sha256": hashlib.sha256(repr(self._first).encode()).hexdigest()}

    def changed(self) -> bool:
        """Whether a file was written to, replaced or removed since they were looked at."""
        return self._stats() != self._first

    def close(self) -> None:
        """Nothing is held open."""


def _slices_in(path: Path) -> list[Path]:
    """The files of one slice each, in natural order; what else lies there is left out, and said unless hidden."""
    if path.is_dir():
        files = [file for file in path.iterdir() if file.is_file()]
    elif is_pattern(path):
        files = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]  # noqa: PTH207
    else:
        files = [path]
    shown = [file for file in files if not file.name.startswith(".")]
    slices = sorted((file for file in shown if _start_of(file).startswith(_PICTURES + _TIFFS)), key=_natural)
    others = sorted(file.name for file in shown if file not in set(slices))
    if not slices:
        raise StackError(f"{path} has no PNG, JPEG or TIFF file in it: name a stack, or a folder of slices")
    if others:
        more = " ..." if len(others) > _NAMED else ""
        warn(f"{path} has {len(others)} files that are no slices ({', '.join(others[:_NAMED])}{more}): left out")
    return slices


def _start_of(file: Path) -> bytes:
    try:
        with file.open("rb") as stream:
            return stream.read(8)
    except OSError as error:
        raise StackError(f"{file} cannot be read: {error.strerror}") from error


def _natural(file: Path) -> list[tuple[int, int | str]]:
    """A key by which 9 comes before 10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", str(file)) if part]


def _say_gaps(path: Path, files: list[Path]) -> None:
    """Say which numbers are missing where the names differ in one number alone, which rises by ones."""
    parts = [re.split(r"(\d+)", file.name) for file in files]
    if len(files) < 3 or len({len(part) for part in parts}) != 1:
        return
    varying = [place for place in range(len(parts[0])) if len({part[place] for part in parts}) > 1]
    if len(varying) != 1 or varying[0] % 2 == 0:
        return
    numbers = [int(part[varying[0]]) for part in parts]
    missing = sorted(set(range(numbers[0], numbers[-1])) - set(numbers)) if numbers[-1] < _MOST_GAPS else []
    # Every tenth slice is a choice; a number here and there is a gap.
    if 0 < len(missing) < len(files) / 2:
        named = ", ".join(str(number) for number in missing[:_NAMED])
        more = " ..." if len(missing) > _NAMED else ""
        warn(f"{path} has no slice {named}{more} between {numbers[0]} and {numbers[-1]}: the others are read")


def _look_at(file: Path, limits: Limits) -> tuple[int, int, np.dtype[Any]]:
    """Height, width and pixel format of a file of one slice."""
    if is_tiff(_start_of(file)):
        with StackReader(file, limits) as reader:
            if reader.pages != 1:
                raise StackError(f"{file} has {reader.pages} slices, where each file has one: name it alone")
            return reader.height, reader.width, reader.dtype
    with _open_picture(file) as picture:
        height, width, dtype = picture.height, picture.width, np.dtype(_dtype_of(picture))
    if height * width > limits.max_pixels_at_once or dtype.name not in limits.dtypes:
        raise StackError(f"{file} is {height} x {width} {dtype}, which is not read: convert it to smaller 8-bit slices")
    return height, width, dtype


def _open_picture(file: Path) -> PilImage.Image:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the limits say what is read
    try:
        return Image.open(file)
    except (OSError, SyntaxError, ValueError) as error:
        raise StackError(f"{file} is truncated or damaged ({error}): copy it again") from error


def _dtype_of(picture: PilImage.Image) -> str:
    return {"1": "uint8", "I": "int32", "F": "float32"}.get(picture.mode, "uint16" if "16" in picture.mode else "uint8")


def _read_picture(file: Path, limits: Limits) -> npt.NDArray[Any]:
    """The grey pixels of a PNG or JPEG; one in colour has to show grey alone."""
    with _open_picture(file) as picture:
        dtype = _dtype_of(picture)
        try:
            if picture.mode in _GREY:
                return np.asarray(picture.convert("L") if picture.mode == "1" else picture).astype(dtype)
            planes = np.asarray(picture.convert("RGBA"))
        except (MemoryError, OSError, SyntaxError, ValueError) as error:
            raise StackError(f"{file} is truncated or damaged ({error}): copy it again") from error
    grey = planes[..., 0]
    if not ((planes[..., 1] == grey).all() and (planes[..., 2] == grey).all() and (planes[..., 3] == 255).all()):
        raise StackError(f"{file} {limits.in_colour}")
    return np.ascontiguousarray(grey)
