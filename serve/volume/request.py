"""What is wanted of a volume, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from serve.volume.outputs import LABEL_DTYPES, PICTURE, stem_of, target_of
from unet.config import setting
from unet.volume.opening import beside

if TYPE_CHECKING:
    from unet.intensity import Window, WindowChoice


@dataclass(frozen=True)
class Request:
    """What is wanted of a volume.

    Attributes:
        kinds: of `outputs.KINDS`.
        folder: for what is written; the source's own if None.
        threshold: of masks, labels and overlays.
        label_dtype: "uint16" or "uint32".
        window: intensities that become 0 and 255, or how they are found; see ``unet.intensity.find_windows``.
        picture_slice: the slice that is drawn as a PNG, or None.
        resample: scale slices to the network's pixel size, and what is found of them back.
        resume: go on with what an interrupted run has found.
        overwrite: replace former results.
        quiet: show no progress bar.
    """

    kinds: tuple[str, ...] = ("probability",)
    folder: Path | None = None
    threshold: float = setting(0.5, "of mask, labels and overlay: membrane is not above it")
    label_dtype: str = setting("uint16", "of labels", choices=LABEL_DTYPES)
    window: WindowChoice = None
    picture_slice: int | None = 0
    resample: bool = setting(False, "scale slices to the network's pixel size, and the results back")
    resume: bool = setting(False, "continue what an interrupted run has found; finished stacks are left as they are")
    overwrite: bool = setting(False, "replace what a former run wrote")
    quiet: bool = setting(False, "no progress bar, no summary")

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ClientError(f"--threshold is {self.threshold:g}; it must be from 0 to 1")

    def targets(self, source: Path) -> dict[str, Path]:
        """What is written of a source, by kind; `outputs.PICTURE` is the PNG."""
        found = {kind: target_of(source, kind, self.folder) for kind in self.kinds}
        if self.picture_slice is not None:
            found[PICTURE] = (self.folder or beside(source)[0]) / f"{stem_of(source)[0]}-overlay.png"
        return found

    def partial_folder(self, source: Path) -> Path:
        """Where the results so far are kept."""
        return (self.folder or beside(source)[0]) / f"{stem_of(source)[0]}.partial"


@dataclass(frozen=True)
class Summary:
    """What segmenting one volume came to.

    Attributes:
        recalled: bands that a former run had found.
        window: intensities that became 0 and 255, of all slices or of each; None if they stayed as they were.
        intensities: the same in words.
        bands: in all.
        resent: requests that were sent once more.
    """

    input: str
    outputs: dict[str, str]
    slices: int
    height: int
    width: int
    window: Window | tuple[Window | None, ...] | None
    intensities: str
    bands: int
    recalled: int
    resent: int
    seconds: float

    @property
    def slices_per_s(self) -> float:
        """Slices per second, reading and writing included."""
        return self.slices / self.seconds
