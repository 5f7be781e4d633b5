"""A picture of one slice with its membrane drawn over it, and what outputs say of how they were made."""

from __future__ import annotations

import os
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from unet.errors import UnetError
from unet.files import atomic_file
from unet.names import DEFAULT_THRESHOLD

MEMBRANE_COLOUR = (255, 64, 32)
OPACITY = 0.75
GAP_PX = 8
MAX_SIDE_PX = 2048
# What this program's name in its files begins with.
SOFTWARE = "unet-medical-triton"
# Of a PNG: its signature, and its first chunk, which others follow.
_PNG_HEAD_BYTES = 33
_PNG_NOTE = "Comment"


def membrane_overlay(
    image: npt.NDArray[np.uint8], probability: npt.NDArray[Any], threshold: float = 0.5
) -> npt.NDArray[np.uint8]:
    """The slice in grey, tinted where the membrane is: uint8 [H, W, 3].

    Args:
        image: uint8 [H, W].
        probability: of "not membrane", [H, W] in [0, 1]; the surer the network, the stronger the tint.
        threshold: a pixel is membrane where its probability is not above this.
    """
    grey = np.repeat(image[..., np.newaxis], 3, axis=-1).astype(np.float32)
    sureness = np.where(probability <= threshold, 1 - probability.astype(np.float32), 0)[..., np.newaxis]
    mixed = grey + (np.array(MEMBRANE_COLOUR, np.float32) - grey) * (OPACITY * sureness)
    return np.asarray(np.rint(mixed), np.uint8)


def overlay_png(
    path: str | os.PathLike[str],
    image: npt.NDArray[np.uint8],
    probability: npt.NDArray[Any],
    threshold: float = 0.5,
) -> None:
    """Write the slice and, beside it, the same slice with its membrane, as one PNG.

    A slice of more than 2048 pixels is shown smaller, by a whole factor: means of its intensities, and the surest
    membrane of its probabilities, so that thin membranes stay.

    Raises:
        UnetError: if the probability is not of the slice's shape.
    """
    from PIL import Image, PngImagePlugin

    if image.ndim != 2 or image.shape != probability.shape:
        raise UnetError(f"{path} cannot show a probability of {probability.shape} over a slice of {image.shape}")
    image, probability = shrink(image, probability, shrink_factor(*image.shape))
    raw = np.repeat(image[..., np.newaxis], 3, axis=-1)
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    both = np.concatenate([raw, gap, membrane_overlay(image, probability, threshold)], axis=1)
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", SOFTWARE)
    with atomic_file(path) as aside:
        Image.fromarray(both).save(aside, format="PNG", compress_level=1, pnginfo=about)


def shrink_factor(height: int, width: int) -> int:
    """By how much the sides of a slice of this size are divided in its picture."""
    return -(-max(height, width) // MAX_SIDE_PX)


def shrink(
    image: npt.NDArray[np.uint8], probability: npt.NDArray[Any], factor: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
    """A slice [H, W] and its probability, both divided by a whole factor; strips of its rows may be done one by one.

    Strips must begin at multiples of the factor.
    """
    if factor == 1:
        return image, probability
    smaller = np.asarray(np.rint(_blocks(image, factor).mean(axis=(1, 3), dtype=np.float32)), np.uint8)
    return smaller, _blocks(probability, factor).min(axis=(1, 3))


def _blocks(plane: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    """A plane [H, W] as [H / factor, factor, W / factor, factor], its last rows and columns repeated to fill up."""
    fill = [(0, -side % factor) for side in plane.shape]
    filled = np.pad(plane, fill, mode="edge")
    return filled.reshape(filled.shape[0] // factor, factor, filled.shape[1] // factor, factor)


def note_in_png(path: Path, note: str) -> None:
    """Put a note of how it was made into a PNG, where ``made_by`` finds it."""
    data = path.read_bytes()
    chunk = b"tEXt" + f"{_PNG_NOTE}\0{note}".encode("latin-1", "replace")
    length, check = (struct.pack(">I", number) for number in (len(chunk) - 4, zlib.crc32(chunk)))
    path.write_bytes(data[:_PNG_HEAD_BYTES] + length + chunk + check + data[_PNG_HEAD_BYTES:])


def made_by(path: Path) -> str:
    """What the tag of an output says of how it was made; "" if nothing can be read."""
    import tifffile
    from PIL import Image

    from unet.volume.ngff.reader import load_zarr

    try:
        if path.is_dir():
            return str(dict(load_zarr().open(str(path), mode="r").attrs["unet"])["made_by"])
        if path.suffix == ".png":
            with Image.open(path) as picture:
                return str(picture.info[_PNG_NOTE])
        with tifffile.TiffFile(path) as tiff:
            return str(tiff.pages.first.software)
    except Exception:  # whatever it is, it is not this program's
        return ""


def exactly(threshold: float) -> str:
    """A threshold as tags note it: short where that is exact, else with all its digits."""
    short = f"{threshold:g}"
    return short if float(short) == threshold else repr(float(threshold))


def noted_threshold(path: Path) -> float:
    """The threshold that the client cut at, or would have, when it wrote a file; one half if nothing says so."""
    # The last one: a volume's name may stand before it, and may have such words too.
    found = re.findall(r"threshold (\d+(?:\.\d+)?(?:e-\d+)?)(?![\w.])", made_by(path))
    return float(found[-1]) if found else DEFAULT_THRESHOLD
