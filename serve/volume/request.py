"""What is wanted of a volume, and what came of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from serve.volume.cells import table_of
from serve.volume.outputs import LABEL_DTYPES, PICTURE, stem_of, target_of
from unet.config import setting
from unet.errors import complain
from unet.progress import Progress
from unet.volume.opening import beside

if TYPE_CHECKING:
    from unet.intensity import Window, WindowChoice


@dataclass(frozen=True)
class Share:
    """One of several equal parts of a plan.

    Attributes:
        index: which, from 0 on.
        count: of how many.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """From K/N.

        Raises:
            ClientError: it is something else.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        if found is None or not int(found[1]) < int(found[2]):
            raise ClientError(
                f"--shard {text} is not K/N with K from 0 to N-1: an array of 100 tasks has 0/100 to 99/100, that is "
                "$SLURM_ARRAY_TASK_ID/100 of --array=0-99, or $JOB_COMPLETION_INDEX/100"
            )
        return cls(int(found[1]), int(found[2]))

    def of(self, total: int) -> range:
        """The numbers of this share's shards: neighbours, which read the same chunks of the input."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)


@dataclass(frozen=True)
class Request:
    """What is wanted of a volume.

    Attributes:
        kinds: of `outputs.KINDS`.
        folder: for what is written; the source's own if None.
        threshold: of masks, labels and overlays; None takes the one that the network's training chose, or one half.
        label_dtype: "uint16" or "uint32".
        link: share of what two segments of neighbouring slices cover together that both must cover to be one cell of
            "labels3d" (intersection over union); 0 for any pixel, which gives the 6-connected components.
        min_voxels: of such a cell; smaller ones are left out.
        agglomerate: of "labels": segments are cut at their narrow places, and pieces are put together where the mean
            probability of membrane along their border is below this; None for plain segments.
        window: intensities that become 0 and 255, or how they are found; see ``unet.intensity.find_windows``.
        picture_slice: the slice that is drawn as a PNG, or None.
        resample: scale slices to the network's pixel size, and what is found of them back.
        resume: go on with what an interrupted run has found.
        overwrite: replace former results.
        shard_mpx: size of the parts that several processes share out, in millions of pixels.
        quiet: do not tell how far the work is.
        by_shards: OME-Zarr volumes go by shards.
        share: the part of the volume that is this process's, where several work on it without knowing each other.
    """

    kinds: tuple[str, ...] = ("probability",)
    folder: Path | None = None
    threshold: float | None = setting(
        None, "of mask, labels and overlay: membrane is not above it; None: what training chose, or 0.5", kind=float
    )
    label_dtype: str = setting("uint16", "of labels", choices=LABEL_DTYPES)
    link: float = setting(0.0, "intersection over union that makes segments of neighbouring slices one cell")
    min_voxels: int = setting(1, "of a cell of labels3d; smaller ones are left out")
    agglomerate: float | None = setting(
        None, "of labels: cut cells at narrow places, join where the border is membrane with less than this", kind=float
    )
    window: WindowChoice = None
    picture_slice: int | None = 0
    resample: bool = setting(False, "scale slices to the network's pixel size, and the results back")
    resume: bool = setting(False, "continue what an interrupted run has found; finished stacks are left as they are")
    overwrite: bool = setting(False, "replace what a former run wrote")
    shard_mpx: float = setting(64.0, "million pixels of a shard, for --shard and --dask; the same for all processes")
    quiet: bool = setting(False, "tell neither how far the work is nor what became of it")
    by_shards: bool = False
    share: Share | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ClientError(f"--threshold is {self.threshold:g}; it must be from 0 to 1")
        if not 0 <= self.link <= 1 or self.min_voxels < 1:
            raise ClientError(
                f"--link {self.link:g} must be from 0 to 1, and --min_voxels {self.min_voxels} must be at least 1"
            )
        if self.agglomerate is not None and "labels" not in self.kinds:
            raise ClientError("--agglomerate is for --output labels: add that, or leave it out")
        if not self.shard_mpx > 0:
            raise ClientError(f"--shard_mpx is {self.shard_mpx:g}; it must be positive")

    def targets(self, source: Path) -> dict[str, Path]:
        """What is written of a source, by kind; `outputs.PICTURE` is the PNG."""
        found = {kind: target_of(source, kind, self.folder) for kind in self.kinds}
        if self.picture_slice is not None:
            found[PICTURE] = (self.folder or beside(source)[0]) / f"{stem_of(source)[0]}-overlay.png"
        return found

    def files(self, source: Path) -> list[Path]:
        """All that is written of a source: its targets, and the table beside cells in 3-D."""
        targets = self.targets(source)
        return [*targets.values(), *(table_of(path) for kind, path in targets.items() if kind == "labels3d")]

    def progress(
        self, total: int | None, what: str, *, unit: str = "slice", name: str | None = None, passing: bool = False
    ) -> Progress:
        """What shows how far work is, on standard error: see `unet.progress.Progress`."""
        return Progress(total, what, complain, unit=unit, name=name, quiet=self.quiet, passing=passing)

    def partial_folder(self, source: Path) -> Path:
        """Where the results so far are kept."""
        return (self.folder or beside(source)[0]) / f"{stem_of(source)[0]}.partial"

    def shards_folder(self, source: Path) -> Path:
        """Where the processes that share a volume keep its plan and what they have found."""
        return (self.folder or beside(source)[0]) / f"{stem_of(source)[0]}.shards"


@dataclass(frozen=True)
class Summary:
    """What segmenting one volume came to.

    Attributes:
        recalled: bands that a former run had found.
        window: intensities that became 0 and 255, of all slices or of each; None if they stayed as they were.
        intensities: the same in words.
        bands: in all.
        resent: requests that were sent once more.
        missing: shards that other processes have not computed yet; the outputs appear when there are none.
        threshold: of masks, labels and overlays; None where another process has written them.
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
    missing: int = 0
    threshold: float | None = None

    @property
    def slices_per_s(self) -> float:
        """Slices per second, reading and writing included."""
        return self.slices / self.seconds
