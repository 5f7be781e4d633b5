"""The bands of one volume on their way: read, sent, stored as they come, and handed to what is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.bands import Band, Job, bands_of
from serve.volume.cells import cells_mark
from serve.volume.outputs import PICTURE, Output, OutputSettings, labels_mark
from unet import __version__
from unet.names import DEFAULT_THRESHOLD
from unet.scores import check_limit
from unet.tracing import span
from unet.volume import BLOCK_PX
from unet.volume.overlay import SOFTWARE, exactly, note_in_png, overlay_png, shrink, shrink_factor
from unet.volume.scaled import Planes, ScaledRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from serve.segment.segmenter import Segmenter
    from serve.volume.partial import Partial, RawStore
    from serve.volume.request import Request
    from unet.geometry import TilePlan
    from unet.intensity import Windows
    from unet.progress import Progress
    from unet.volume import Volume

    # From bands with their pixels to the same with their probabilities, in any order.
    SegmentBands = Callable[[Iterable[Job]], Iterator[tuple[Job, npt.NDArray[Any]]]]

PICTURE_FILE = "picture.png"


@dataclass
class Run:
    """A volume at work: what is read, how it is segmented, and what is wanted of it.

    Attributes:
        volume: open, as it is in its file.
        seen: as the network sees it: the same, or scaled.
        request: what is wanted.
        segmenter: connected.
        windows: intensities that become 0 and 255.
        plan: how tiles cover a slice that is seen.
        bands: of each slice that is seen.
        written: of each slice of the volume.
    """

    volume: Volume
    seen: Volume
    request: Request
    segmenter: Segmenter
    windows: Windows
    plan: TilePlan = field(init=False)
    bands: tuple[Band, ...] = field(init=False)
    written: tuple[Band, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.plan = self.segmenter.plan(self.seen.height, self.seen.width)
        self.bands = self.written = bands_of(self.plan)
        if self.is_scaled:
            self.written = bands_of(self.segmenter.plan(self.volume.height, self.volume.width))
        if self.request.agglomerate is not None:
            check_limit(self.threshold, self.request.agglomerate)

    @property
    def is_scaled(self) -> bool:
        """Whether the network sees slices of another size."""
        return self.seen is not self.volume

    @property
    def targets(self) -> dict[str, Path]:
        """What is written, by kind."""
        return self.request.targets(self.volume.path)

    @property
    def header(self) -> dict[str, Any]:
        """What probabilities depend on; what is written of them may be chosen anew."""
        served = self.segmenter.interface
        return {
            "input": self.volume.fingerprint(),
            "size": [len(self.seen), self.seen.height, self.seen.width],
            # The card tells which network it is; the same may be served under several numbers.
            "model": served.card_sha256 or served.version,
            "intensity_window": self.windows.value,
            "tile_size": self.plan.tile_size,
            "tta": self.segmenter.settings.tta,
        }

    @property
    def output_settings(self) -> OutputSettings:
        """How outputs are written."""
        served = self.segmenter.interface
        card = f" card {served.card_sha256[:12]}" if served.card_sha256 else ""
        own = f" threshold {exactly(self.threshold)}" if self.request.threshold is None else ""
        made = f"{SOFTWARE} {__version__}; model version {served.version}{card}{own}; {self.marks}"
        request = self.request
        how = request.kinds, self.threshold, request.label_dtype, self.windows, made
        return OutputSettings(*how, request.link, request.min_voxels, request.agglomerate)

    @property
    def threshold(self) -> float:
        """Of masks, labels and overlays: what was asked for, or else what the network's training chose."""
        for known in (self.request.threshold, self.segmenter.interface.threshold):
            if known is not None:
                return known
        return DEFAULT_THRESHOLD

    @property
    def marks(self) -> str:
        """What in an output's tag tells whether it is of this input and these settings."""
        return marks_of(self.volume, self.windows, self.request, tta=self.segmenter.settings.tta)

    def job(self, page: int, band: Band) -> Job:
        """A band with its pixels read, in 8 bits."""
        with span("read", slice=page, row=band.read0):
            rows = self.seen.rows(page, band.read0, band.read1)
        with span("window", slice=page):
            image = self.windows.apply(page, rows)
        return Job(page, band, self.plan.tile_size, image, band.read0, self.seen.height)


def marks_of(volume: Volume, windows: Windows, request: Request, *, tta: bool) -> str:
    """What an output's tag says of the input and of the settings."""
    # Without one of its own the request takes the network's, which stands beside the network's version.
    threshold = "the network's" if request.threshold is None else exactly(request.threshold)
    return (
        f"intensity window {windows}; threshold {threshold}; views {8 if tta else 1}; "
        f"{'resampled; ' if request.resample else ''}input {volume.fingerprint()['sha256'][:12]}"
    )


def slice_mark(request: Request, kind: str) -> str:
    """What the tag of one kind says beside that."""
    if kind == "labels3d":
        return cells_mark(request.link, request.min_voxels)
    if kind == "labels":
        return labels_mark(request.agglomerate)
    return f"; slice {request.picture_slice}" if kind == PICTURE else ""


class _Delivery:
    """Hands bands to the outputs and keeps the bar."""

    def __init__(self, run: Run, store: RawStore, outputs: list[Output], aside: Path, progress: Progress) -> None:
        self._run, self._outputs, self._aside, self._progress = run, outputs, aside, progress
        self.found: Planes = store
        if run.is_scaled:
            seen, size = (run.seen.height, run.seen.width), (run.volume.height, run.volume.width)
            self.found = ScaledRows(store, seen, size)
        self._left = dict.fromkeys(range(len(run.volume)), len(run.bands))

    def __call__(self, page: int, band: Band, rows: npt.NDArray[Any]) -> None:
        run = self._run
        if not run.is_scaled:
            self._write(page, band.row0, rows)
        self._left[page] -= 1
        if self._left[page] == 0:
            for part in run.written if run.is_scaled else ():
                self._write(page, part.row0, self.found.read(page, part.row0, part.row1))
            for output in self._outputs:
                output.finish_page(page, self.found)
            # Now rather than at the end: the server is at work on others.
            if page == run.request.picture_slice:
                draw(run, page, self.found, self._aside / PICTURE_FILE)
        self._progress.advance()

    def _write(self, page: int, row0: int, rows: npt.NDArray[Any]) -> None:
        with span("write", slice=page, row=row0):
            for output in self._outputs:
                output.write(page, row0, rows)


def produce(run: Run, partial: Partial, store: RawStore, outputs: list[Output], segment_bands: SegmentBands) -> int:
    """Have every band in the store and in the outputs; returns how many a former run had found."""
    units = [(page, band) for page in range(len(run.volume)) for band in run.bands]
    unit, name = "slice" if len(run.bands) == 1 else "band", run.volume.path.name
    with run.request.progress(len(units), f"{unit}s of {name} segmented", unit=unit, name=name) as progress:
        deliver = _Delivery(run, store, outputs, partial.folder, progress)
        missing = []
        for page, band in units:
            rows = partial.recall(store, page, band.row0, band.row1)
            if rows is None:
                missing.append((page, band))
            else:
                deliver(page, band, rows)
        progress.from_here()
        for job, rows in segment_bands(run.job(page, band) for page, band in missing):
            partial.keep(store, job.page, job.band.row0, rows)
            deliver(job.page, job.band, rows)
    for output in outputs:
        output.finish(deliver.found, run.request.progress)
    return len(units) - len(missing)


def draw(run: Run, page: int, found: Planes, path: Path) -> None:
    """Draw one slice as a PNG, by strips if it is large."""
    height, width = run.volume.height, run.volume.width
    factor = shrink_factor(height, width)
    step = max(1, BLOCK_PX // (width * factor)) * factor
    images, probabilities = [], []
    for row0 in range(0, height, step):
        row1 = min(height, row0 + step)
        image = run.windows.apply(page, run.volume.rows(page, row0, row1))
        probability = found.read(page, row0, row1).astype(np.float32)
        shrunk = shrink(image, probability, factor)
        images.append(shrunk[0])
        probabilities.append(shrunk[1])
    overlay_png(path, np.concatenate(images), np.concatenate(probabilities), run.threshold)
    note_in_png(path, run.output_settings.made_by + slice_mark(run.request, PICTURE))
