"""The bands of one volume on their way: read, sent, stored as they come, and handed to what is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from serve.segment.bands import Band, Job
from serve.segment.errors import ClientError
from unet.volume import BLOCK_PX
from unet.volume.overlay import overlay_png, shrink, shrink_factor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from serve.segment.segmenter import Segmenter
    from serve.volume.outputs import Output
    from serve.volume.partial import Partial, Store
    from unet.geometry import TilePlan
    from unet.intensity import Windows
    from unet.volume import Volume
    from unet.volume.scaled import Planes

PICTURE = "picture.png"
# Computes the bands that are missing in a run's store.
Filler = Callable[["Run", "list[tuple[int, Band]]"], None]


@dataclass
class Run:
    """A volume at work.

    Attributes:
        volume: as it is in its file.
        seen: as the network sees it: the same, or scaled.
        windows: how its intensities become 8 bits.
        plan: of a slice that is seen.
        bands: likewise.
        partial: what was found so far.
        store: the probabilities of what is seen.
        found: those of the volume: the same, or scaled back.
        written: the bands of a slice of the volume.
        outputs: what is written of it.
        picture_slice: the slice that is drawn, or None.
        threshold: of its membrane.
        quiet: show no progress bar.
    """

    volume: Volume
    seen: Volume
    windows: Windows
    plan: TilePlan
    bands: tuple[Band, ...]
    partial: Partial
    store: Store
    found: Planes
    written: tuple[Band, ...]
    outputs: list[Output]
    picture_slice: int | None
    threshold: float
    quiet: bool

    @property
    def is_scaled(self) -> bool:
        """Whether the network sees slices of another size."""
        return self.seen is not self.volume

    def units(self) -> Iterator[tuple[int, Band]]:
        """Every band of every slice."""
        return ((page, band) for page in range(len(self.seen)) for band in self.bands)


class _Delivery:
    """Hands bands to the outputs and keeps the bar."""

    def __init__(self, run: Run, bar: Any) -> None:
        self._run, self._bar = run, bar
        self._left = dict.fromkeys(range(len(run.volume)), len(run.bands))

    def __call__(self, page: int, band: Band, rows: npt.NDArray[Any]) -> None:
        run = self._run
        if not run.is_scaled:
            self._write(page, band.row0, rows)
        self._left[page] -= 1
        if self._left[page] == 0:
            for part in run.written if run.is_scaled else ():
                self._write(page, part.row0, run.found.read(page, part.row0, part.row1))
            for output in run.outputs:
                output.finish_page(page, run.found)
            # Now rather than at the end: the server is at work on others.
            if page == run.picture_slice:
                _draw(run, page)
        self._bar.update()

    def _write(self, page: int, row0: int, rows: npt.NDArray[Any]) -> None:
        for output in self._run.outputs:
            output.write(page, row0, rows)

    def recall(self, units: Iterable[tuple[int, Band]]) -> list[tuple[int, Band]]:
        """Hand over those of some bands that are in the store; returns those that are not."""
        missing = []
        for page, band in units:
            rows = self._run.partial.recall(self._run.store, page, band.row0, band.row1)
            if rows is None:
                missing.append((page, band))
            else:
                self(page, band, rows)
        return missing


def produce(segmenter: Segmenter, run: Run, fill: Filler | None) -> int:
    """Have every band in the store and in the outputs; returns how many a former run had found."""
    total = len(run.volume) * len(run.bands)
    unit = "slice" if len(run.bands) == 1 else "band"
    disable = True if run.quiet else None
    with tqdm(total=total, unit=unit, desc=run.volume.path.name, disable=disable) as bar:
        deliver = _Delivery(run, bar)
        missing = deliver.recall(run.units())
        # The bar's rate and time are of what is computed now.
        bar.initial = total - len(missing)
        bar.unpause()
        if fill is not None:
            fill(run, missing)
            if lost := deliver.recall(missing):
                raise ClientError(f"slice {lost[0][0]} did not reach {run.partial.folder}: workers must share its disk")
        else:
            jobs = (job_of(run.seen, run.windows, run.plan, page, band) for page, band in missing)
            for job, rows in segmenter.segment_bands(jobs):
                run.partial.keep(run.store, job.page, job.band.row0, rows)
                deliver(job.page, job.band, rows)
    return total - len(missing)


def job_of(volume: Volume, windows: Windows, plan: TilePlan, page: int, band: Band) -> Job:
    """A band with its pixels read, in 8 bits."""
    image = windows.apply(page, volume.rows(page, band.read0, band.read1))
    return Job(page, band, plan.tile_size, image, band.read0, volume.height)


def _draw(run: Run, page: int) -> None:
    """Draw one slice beside the results so far, by strips if it is large."""
    height, width = run.volume.height, run.volume.width
    factor = shrink_factor(height, width)
    step = max(1, BLOCK_PX // (width * factor)) * factor
    images, probabilities = [], []
    for row0 in range(0, height, step):
        row1 = min(height, row0 + step)
        image = run.windows.apply(page, run.volume.rows(page, row0, row1))
        probability = run.found.read(page, row0, row1).astype(np.float32)
        shrunk = shrink(image, probability, factor)
        images.append(shrunk[0])
        probabilities.append(shrunk[1])
    overlay_png(run.partial.folder / PICTURE, np.concatenate(images), np.concatenate(probabilities), run.threshold)
