"""One volume from file to files: read, sent, stored as it comes, written, and gone on with after a crash."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.segment.bands import Band, bands_of
from serve.segment.errors import ClientError
from serve.volume.outputs import Output, OutputSettings, stem_of, target_of
from serve.volume.partial import Partial, RawStore, Store
from serve.volume.scale import as_seen
from serve.volume.work import PICTURE, Filler, Run, produce
from unet import __version__
from unet.errors import warn
from unet.intensity import Window, WindowChoice, Windows, find_windows
from unet.volume import Volume, ZarrCanvas, ZarrStack, open_volume
from unet.volume.opening import beside
from unet.volume.scaled import Planes, ScaledRows

if TYPE_CHECKING:
    import numpy as np

    from serve.segment.segmenter import Segmenter
    from unet.geometry import TilePlan


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
        resample: scale slices to the network's pixel size, and what is found of them back.
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
    resample: bool = False
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
        seen = as_seen(segmenter, volume, resample=request.resample)
        plan = segmenter.plan(seen.height, seen.width)
        bands = bands_of(plan)
        header = _header(segmenter, seen, windows, plan, request)
        partial = Partial(
            request.partial_folder(source), header, resume=request.resume, anew=request.overwrite and not request.resume
        )
        finished = False
        try:
            recalled, targets = _work(segmenter, volume, seen, windows, plan, bands, partial, request, fill)
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
    seen: Volume,
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
        store = _store(seen, partial, segmenter.probability_dtype, bands, shared=fill is not None)
        stack.callback(store.close)
        found: Planes = store
        written = bands
        if seen is not volume:
            size = (volume.height, volume.width)
            found = ScaledRows(store, (seen.height, seen.width), size)
            written = bands_of(segmenter.plan(*size))
        outputs = []
        for kind in request.kinds:
            outputs.append(Output(kind, targets[kind], partial.folder, volume, written, settings))
            stack.callback(outputs[-1].close)
        drawn = request.picture_slice, request.threshold, request.quiet
        run = Run(volume, seen, windows, plan, bands, partial, store, found, written, outputs, *drawn)
        recalled = produce(segmenter, run, fill)
    if volume.changed():
        raise ClientError(
            f"{volume.path} was changed or replaced while it was read, so that the result may be of two stacks: run it "
            "again with --overwrite"
        )
    for output in outputs:
        output.publish()
    if request.picture_slice is not None:
        os.replace(partial.folder / PICTURE, targets["picture"])
    return recalled, targets


def _made_by(segmenter: Segmenter, windows: Windows, request: Request) -> str:
    """For the outputs' tags."""
    served = segmenter.interface
    card = f" card {served.card_sha256[:12]}" if served.card_sha256 else ""
    return (
        f"unet-medical-triton {__version__}; model version {served.version}{card}; intensity window {windows}; "
        f"threshold {request.threshold:g}; views {8 if request.tta else 1}{'; resampled' if request.resample else ''}"
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
