"""One volume from file to files: read, sent, stored as it comes, written, and gone on with after a crash."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from serve.segment.bands import Band, Job, bands_of
from serve.segment.errors import ClientError
from serve.volume.outputs import Output, OutputSettings, stem_of, target_of
from serve.volume.partial import Partial, RawStore, Store
from unet import __version__
from unet.errors import warn
from unet.intensity import Window, WindowChoice, Windows, find_windows
from unet.volume import BLOCK_PX, Volume, ZarrCanvas, ZarrStack, open_volume
from unet.volume.metadata import typical_pixel_nm
from unet.volume.opening import beside
from unet.volume.overlay import overlay_png, shrink, shrink_factor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from serve.segment.segmenter import Segmenter
    from unet.geometry import TilePlan

_PICTURE = "picture.png"
# By more than a quarter.
_MOST_DIFFERENT = 1.25
# Computes the bands that are missing in a run's store.
Filler = Callable[["Run", "list[tuple[int, Band]]"], None]


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
        resume: go on with what an interrupted run has found.
        overwrite: replace former results.
        tta: whether the segmenter takes the mean of several views.
        quiet: show no progress bar.
    """

    kinds: tuple[str, ...] = ("probability",)
    folder: Path | None = None
    threshold: float = 0.5
    label_dtype: str = "uint16"
    window: WindowChoice = None
    picture_slice: int | None = 0
    resume: bool = False
    overwrite: bool = False
    tta: bool = False
    quiet: bool = False

    def targets(self, source: Path) -> dict[str, Path]:
        """What is written of a source, by kind; "picture" is the PNG."""
        found = {kind: target_of(source, kind, self.folder) for kind in self.kinds}
        if self.picture_slice is not None:
            found["picture"] = (self.folder or beside(source)[0]) / f"{stem_of(source)[0]}-overlay.png"
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


@dataclass
class Run:
    """A volume at work."""

    volume: Volume
    windows: Windows
    plan: TilePlan
    bands: tuple[Band, ...]
    partial: Partial
    store: Store
    outputs: list[Output]

    def units(self) -> Iterator[tuple[int, Band]]:
        """Every band of every slice."""
        return ((page, band) for page in range(len(self.volume)) for band in self.bands)


def segment_volume(segmenter: Segmenter, source: Path, request: Request, fill: Filler | None = None) -> Summary:
    """Segment one volume into files that appear whole or not at all.

    What was found before a crash or an error stays in ``NAME.partial`` for ``resume``.

    Args:
        segmenter: the connection.
        source: a volume of any format that ``unet.volume.open_volume`` reads.
        request: what is wanted.
        fill: computes what is missing in the store; by default the segmenter does.

    Raises:
        StackError: if the source cannot be read.
        ClientError: if the server does not answer or refuses, or the request does not fit the volume.
    """
    started = time.perf_counter()
    with open_volume(source) as volume:
        if request.picture_slice is not None and not 0 <= request.picture_slice < len(volume):
            raise ClientError(
                f"{source} has slices 0 to {len(volume) - 1}; there is no slice {request.picture_slice} to draw"
            )
        windows = find_windows(volume, request.window)
        for note in windows.notes:
            warn(note)
        _compare_pixels(segmenter, volume)
        plan = segmenter.plan(volume.height, volume.width)
        bands = bands_of(plan)
        header = _header(segmenter, volume, windows, plan, request)
        partial = Partial(
            request.partial_folder(source), header, resume=request.resume, anew=request.overwrite and not request.resume
        )
        finished = False
        try:
            recalled, targets = _work(segmenter, volume, windows, plan, bands, partial, request, fill)
            finished = True
        except ClientError as error:
            if partial.done and not volume.changed():
                kept = f"what was found so far is in {partial.folder}, add --resume to go on with it"
                raise type(error)(f"{error}; {kept}") from error
            raise
        finally:
            partial.close(finished=finished)
        size = len(volume), volume.height, volume.width
    seconds = time.perf_counter() - started
    units = size[0] * len(bands)
    outputs = {kind: str(path) for kind, path in targets.items()}
    return Summary(str(source), outputs, *size, windows.value, str(windows), units, recalled, segmenter.resent, seconds)


def _compare_pixels(segmenter: Segmenter, volume: Volume) -> None:
    """Say where a volume's pixels are of another size than those that the network was trained on."""
    own, trained = typical_pixel_nm([volume.metadata.pixel_size_nm]), segmenter.interface.pixel_size_nm
    if own is not None and trained is not None and not 1 / _MOST_DIFFERENT < own / trained < _MOST_DIFFERENT:
        warn(
            f"{volume.path} has pixels of {own:.3g} nm and the network was trained on {trained:.3g} nm: scale the "
            "slices to its size first, or train on such slices"
        )


def _header(segmenter: Segmenter, volume: Volume, windows: Windows, plan: TilePlan, request: Request) -> dict[str, Any]:
    """What probabilities depend on; what is written of them may be chosen anew."""
    served = segmenter.interface
    return {
        "input": volume.fingerprint(),
        "size": [len(volume), volume.height, volume.width],
        "model": f"{served.version} {served.card_sha256}",
        "intensity_window": windows.value,
        "tile_size": plan.tile_size,
        "tta": request.tta,
    }


def _work(
    segmenter: Segmenter,
    volume: Volume,
    windows: Windows,
    plan: TilePlan,
    bands: tuple[Band, ...],
    partial: Partial,
    request: Request,
    fill: Filler | None,
) -> tuple[int, dict[str, Path]]:
    settings = OutputSettings(
        request.kinds, request.threshold, request.label_dtype, windows, _made_by(segmenter, windows, request)
    )
    targets = request.targets(volume.path)
    with contextlib.ExitStack() as stack:
        store = _store(volume, partial, segmenter.probability_dtype, bands, shared=fill is not None)
        stack.callback(store.close)
        outputs = []
        for kind in request.kinds:
            outputs.append(Output(kind, targets[kind], partial.folder, volume, bands, settings))
            stack.callback(outputs[-1].close)
        run = Run(volume, windows, plan, bands, partial, store, outputs)
        recalled = _produce(segmenter, run, request, fill)
    if volume.changed():
        raise ClientError(
            f"{volume.path} was changed or replaced while it was read, so that the result may be of two stacks: run it "
            "again with --overwrite"
        )
    for output in outputs:
        output.publish()
    if request.picture_slice is not None:
        os.replace(partial.folder / _PICTURE, targets["picture"])
    return recalled, targets


def _made_by(segmenter: Segmenter, windows: Windows, request: Request) -> str:
    """For the outputs' tags."""
    served = segmenter.interface
    card = f" card {served.card_sha256[:12]}" if served.card_sha256 else ""
    return (
        f"unet-medical-triton {__version__}; model version {served.version}{card}; intensity window {windows}; "
        f"threshold {request.threshold:g}; views {8 if request.tta else 1}"
    )


def _store(volume: Volume, partial: Partial, dtype: np.dtype[Any], bands: tuple[Band, ...], *, shared: bool) -> Store:
    """Room for the probabilities: a plain file, or for several writers a Zarr volume whose chunks are the bands."""
    if not shared:
        return RawStore(partial.folder / "probability.raw", volume.height, volume.width, dtype)
    if not isinstance(volume, ZarrStack):
        raise ClientError(
            f"{volume.path} is not a Zarr volume, which a Dask cluster needs: convert it, or leave --dask"
        )
    path = partial.folder / "probability.store"
    return ZarrCanvas(path, volume, dtype, chunk_rows=bands[0].row1 - bands[0].row0, keep=True)


class _Delivery:
    """Hands bands to the outputs and keeps the bar."""

    def __init__(self, run: Run, request: Request, bar: Any) -> None:
        self._run, self._request, self._bar = run, request, bar
        self._left = dict.fromkeys(range(len(run.volume)), len(run.bands))

    def __call__(self, page: int, band: Band, rows: npt.NDArray[Any]) -> None:
        for output in self._run.outputs:
            output.write(page, band.row0, rows)
        self._left[page] -= 1
        if self._left[page] == 0:
            for output in self._run.outputs:
                output.finish_page(page, self._run.store)
            # Now rather than at the end: the server is at work on others.
            if page == self._request.picture_slice:
                _draw(self._run, page, self._request.threshold)
        self._bar.update()

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


def _produce(segmenter: Segmenter, run: Run, request: Request, fill: Filler | None) -> int:
    """Have every band in the store and in the outputs; returns how many a former run had found."""
    total = len(run.volume) * len(run.bands)
    unit = "slice" if len(run.bands) == 1 else "band"
    disable = True if request.quiet else None
    with tqdm(total=total, unit=unit, desc=run.volume.path.name, disable=disable) as bar:
        deliver = _Delivery(run, request, bar)
        missing = deliver.recall(run.units())
        # The bar's rate and time are of what is computed now.
        bar.initial = total - len(missing)
        bar.unpause()
        if fill is not None:
            fill(run, missing)
            if lost := deliver.recall(missing):
                raise ClientError(f"slice {lost[0][0]} did not reach {run.partial.folder}: workers must share its disk")
        else:
            jobs = (job_of(run.volume, run.windows, run.plan, page, band) for page, band in missing)
            for job, rows in segmenter.segment_bands(jobs):
                run.partial.keep(run.store, job.page, job.band.row0, rows)
                deliver(job.page, job.band, rows)
    return total - len(missing)


def job_of(volume: Volume, windows: Windows, plan: TilePlan, page: int, band: Band) -> Job:
    """A band with its pixels read, in 8 bits."""
    image = windows.apply(page, volume.rows(page, band.read0, band.read1))
    return Job(page, band, plan.tile_size, image, band.read0, volume.height)


def _draw(run: Run, page: int, threshold: float) -> None:
    """Draw one slice beside the results so far, by strips if it is large."""
    height, width = run.volume.height, run.volume.width
    factor = shrink_factor(height, width)
    step = max(1, BLOCK_PX // (width * factor)) * factor
    images, probabilities = [], []
    for row0 in range(0, height, step):
        row1 = min(height, row0 + step)
        image = run.windows.apply(page, run.volume.rows(page, row0, row1))
        probability = run.store.read(page, row0, row1).astype(np.float32)
        shrunk = shrink(image, probability, factor)
        images.append(shrunk[0])
        probabilities.append(shrunk[1])
    overlay_png(run.partial.folder / _PICTURE, np.concatenate(images), np.concatenate(probabilities), threshold)
