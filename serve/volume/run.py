"""One volume from file to files, that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from serve.volume.outputs import PICTURE, Output
from serve.volume.partial import JOURNAL, Partial, RawStore
from serve.volume.request import Request, Summary
from serve.volume.scale import as_seen
from serve.volume.space import require_space
from serve.volume.work import PICTURE_FILE, Run, marks_of, produce, slice_mark
from unet.errors import warn
from unet.files import fsync, naming
from unet.intensity import find_windows
from unet.tracing import span
from unet.volume import Volume, open_volume
from unet.volume.overlay import made_by

if TYPE_CHECKING:
    from serve.segment.segmenter import Segmenter
    from serve.volume.work import SegmentBands
    from unet.intensity import Windows


def check_volume(volume: Volume, request: Request) -> None:
    """Refuse a request that does not fit a volume, before any work.

    Raises:
        ClientError: there is no such slice to draw, or an output is there already.
    """
    if request.picture_slice is not None and not 0 <= request.picture_slice < len(volume):
        raise ClientError(
            f"{volume.path} has slices 0 to {len(volume) - 1}; there is no slice {request.picture_slice} to draw"
        )
    if request.overwrite or request.resume:
        return
    for path in request.files(volume.path):
        if path.exists():
            raise ClientError(f"{path} exists already: add --overwrite to replace it, or choose another --output_dir")


def windows_of(volume: Volume, request: Request) -> Windows:
    """How a volume's intensities become 8 bits.

    What tells it from another is found meanwhile: what both need comes from the disk once.
    """
    with (
        span("find window"),
        ThreadPoolExecutor(1) as pool,
        request.progress(None, f"looking through {volume.path.name}", passing=True) as progress,
    ):
        fingerprint = pool.submit(volume.fingerprint)
        windows = find_windows(volume, request.window, progress.advance)
        fingerprint.result()
    return windows


def is_done(volume: Volume, request: Request, *, tta: bool) -> bool:
    """Whether a former run has written all that is wanted, of this input by these settings."""
    targets = request.targets(volume.path)
    unfinished = (request.partial_folder(volume.path) / JOURNAL).exists() or request.shards_folder(volume.path).exists()
    if unfinished or not all(path.exists() for path in request.files(volume.path)):
        return False
    marks = marks_of(volume, windows_of(volume, request), request, tta=tta)
    return all(made_by(path).endswith(marks + slice_mark(request, kind)) for kind, path in targets.items())


def segment_volume(
    segmenter: Segmenter, source: Path, request: Request, segment_bands: SegmentBands | None = None
) -> Summary:
    """Segment one volume into files that appear whole or not at all.

    What was found before a crash or an error stays in ``NAME.partial`` for ``resume``.

    Args:
        segmenter: the connection.
        source: a volume of any format that ``unet.volume.open_volume`` reads.
        request: what is wanted.
        segment_bands: computes the probabilities of bands; by default the segmenter's own.

    Raises:
        StackError: if the source cannot be read.
        ClientError: if the server does not answer or refuses, or the request does not fit the volume.
    """
    started = time.perf_counter()
    with open_volume(source) as volume:
        check_volume(volume, request)
        windows = windows_of(volume, request)
        for note in windows.notes:
            warn(note)
        seen = as_seen(segmenter, volume, resample=request.resample)
        run = Run(volume, seen, request, segmenter, windows)
        require_space([(volume, request)], tta=segmenter.settings.tta)
        anew = request.overwrite and not request.resume
        partial = Partial(request.partial_folder(source), run.header, resume=request.resume, anew=anew)
        finished = False
        try:
            recalled = _work(run, partial, segment_bands or segmenter.segment_bands)
            finished = True
        except ClientError as error:
            if partial.done and not volume.changed():
                error.args = (f"{error}; what was found so far is in {partial.folder}, add --resume to go on with it",)
            raise
        finally:
            partial.close(finished=finished)
        size = len(volume), volume.height, volume.width
    seconds = time.perf_counter() - started
    units = size[0] * len(run.bands)
    outputs = {kind: str(path) for kind, path in run.targets.items()}
    counts = units, recalled, segmenter.resent
    return Summary(str(source), outputs, *size, windows.value, str(windows), *counts, seconds, threshold=run.threshold)


def _work(run: Run, partial: Partial, segment_bands: SegmentBands) -> int:
    """Have every band in the store and in the outputs, and give these their names.

    Returns:
        How many bands a former run had found.
    """
    volume, targets = run.volume, run.targets
    if run.request.overwrite:
        partial.allow_replacing()
    if not partial.may_replace:
        check_volume(volume, replace(run.request, resume=False))
    with contextlib.ExitStack() as stack:
        dtype = run.segmenter.probability_dtype
        store = RawStore(partial.folder / "probability.raw", run.seen.height, run.seen.width, dtype)
        stack.callback(store.close)
        outputs = []
        for kind in run.request.kinds:
            outputs.append(Output(kind, targets[kind], partial.folder, volume, run.written, run.output_settings))
            stack.callback(outputs[-1].close)
        recalled = produce(run, partial, store, outputs, segment_bands)
    if volume.changed():
        raise ClientError(
            f"{volume.path} was changed or replaced while it was read, so that the result may be of two stacks: run it "
            "again with --overwrite"
        )
    # From now on what stands under the final names may be this run's own.
    partial.allow_replacing()
    with span("publish"):
        for output in outputs:
            output.publish()
    if run.request.picture_slice is not None:
        with naming(targets[PICTURE]):
            fsync(partial.folder / PICTURE_FILE)
        os.replace(partial.folder / PICTURE_FILE, targets[PICTURE])
        fsync(targets[PICTURE].parent)
    return recalled
