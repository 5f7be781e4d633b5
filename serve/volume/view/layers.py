"""What the page shows: one volume, and the results that fit it, slice by slice."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.segment.errors import ClientError
from serve.volume.outputs import target_of
from unet.intensity import to_uint8
from unet.volume import IMAGE_LIMITS, LABEL_LIMITS, PROBABILITY_LIMITS, open_volume
from unet.volume.overlay import noted_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from unet.volume import Volume

IMAGE = "image"
KINDS = ("probability", "mask", "labels", "labels3d")
# A screen shows no more; a larger slice is shown by every second pixel, every third and so on.
MAX_SIDE_PX = 2048
_PERCENTILES = (0.1, 99.9)
_LIMITS = {
    IMAGE: IMAGE_LIMITS,
    "probability": PROBABILITY_LIMITS,
    **dict.fromkeys(("mask", "labels", "labels3d"), LABEL_LIMITS),
}
_SENT = {IMAGE: "uint8", "probability": "float32", "mask": "uint8", "labels": "uint32", "labels3d": "uint32"}


@dataclass(frozen=True)
class Layer:
    """One file that is shown.

    Attributes:
        kind: `IMAGE`, or one of `KINDS`.
        volume: the open file; for one thread at a time.
        threshold: of a probability: what the client cut at.
    """

    kind: str
    volume: Volume
    threshold: float | None = None


class Layers:
    """A volume and its results, open; a context manager. Its methods may be called from several threads.

    Args:
        source: the volume.
        results: files of results; None for those that lie beside it, or in ``folder``, under the client's names.
        folder: of the results.

    Raises:
        ClientError: a result is of another size, or its name does not say what it is.
        StackError: a file cannot be read.
    """

    def __init__(self, source: Path, results: Sequence[Path] | None = None, folder: Path | None = None) -> None:
        if results is None:
            named = [target_of(source, kind, folder) for kind in KINDS]
            results = [path for path in named if path.exists()]
        self._lock = threading.Lock()
        self._layers: list[Layer] = []
        try:
            image = self._add(IMAGE, source)
            for path in results:
                self._add(kind_of(path), path)
        except BaseException:
            self.close()
            raise
        self.step = max(1, math.ceil(max(image.height, image.width) / MAX_SIDE_PX))

    def _add(self, kind: str, path: Path) -> Volume:
        volume = open_volume(path, _LIMITS[kind])
        self._layers.append(Layer(kind, volume, noted_threshold(path) if kind == "probability" else None))
        image = self._layers[0].volume
        sizes = [(one.pages, one.height, one.width) for one in (image, volume)]
        if sizes[0] != sizes[1]:
            words = ["{} slices of {} x {}".format(*size) for size in sizes]
            raise ClientError(f"{path} has {words[1]}, and {image.path} has {words[0]}: name results of this volume")
        return volume

    def about(self) -> dict[str, Any]:
        """What the page must know beforehand, for JSON."""
        image = self._layers[0].volume
        return {
            "slices": image.pages,
            "height": image.height,
            "width": image.width,
            "step": self.step,
            "pixel_nm": image.metadata.pixel_size_nm[2],
            "layers": [
                {"kind": one.kind, "name": one.volume.path.name, "type": _SENT[one.kind], "threshold": one.threshold}
                for one in self._layers
            ],
        }

    def plane(self, layer: int, page: int) -> npt.NDArray[Any]:
        """A slice of a layer as it is drawn: every ``step``-th pixel, of the dtype that ``about`` names.

        An image of another type than uint8 has the window of this slice's own percentiles. Probabilities are from 0 to
        1. Of numbers of cells the lower 32 bits are given.

        Raises:
            IndexError: there is no such layer or slice.
            StackError: it cannot be read.
        """
        if not 0 <= layer < len(self._layers):
            raise IndexError(f"there is no layer {layer}")
        one = self._layers[layer]
        with self._lock:
            one.volume.check_page(page)
            whole = one.volume[page]
        shown = whole[:: self.step, :: self.step]
        if one.kind == IMAGE:
            return _grey(shown)
        if one.kind == "probability" and whole.dtype.kind != "f":
            shown = shown / np.float32(np.iinfo(whole.dtype).max)
        if one.kind == "mask":
            shown = shown > 0
        return np.ascontiguousarray(shown, np.dtype(_SENT[one.kind]).newbyteorder("<"))

    def close(self) -> None:
        """Close all files."""
        for layer in self._layers:
            layer.volume.close()

    def __enter__(self) -> Layers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kind_of(path: Path) -> str:
    """What a result holds, by its name.

    Raises:
        ClientError: its name does not say so.
    """
    found = re.search(rf"-({'|'.join(KINDS)})(?=\.)", path.name)
    if found is None:
        raise ClientError(
            f"{path} is not named as the client names its results, NAME-probability.tif and so on: rename it"
        )
    return found[1]


def _grey(shown: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if shown.dtype == np.uint8:
        return np.ascontiguousarray(shown)
    known = shown[np.isfinite(shown)]
    if not known.size or known.min() == known.max():
        return np.zeros(shown.shape, np.uint8)
    low, high = np.percentile(known, _PERCENTILES)
    low, high = (low, high) if low < high else (known.min(), known.max())
    return to_uint8(np.nan_to_num(shown, nan=float(low)), (float(low), float(high)))
