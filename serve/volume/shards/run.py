"""One volume by shards, from file to files: this process's share, or all that is missing by a Dask cluster."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from serve.volume.partial import JOURNAL
from serve.volume.request import Share, Summary
from serve.volume.run import check_volume, is_done, windows_of
from serve.volume.shards.folder import recorded
from serve.volume.shards.plan import can_be_sharded, require_shards
from serve.volume.shards.work import ShardWork
from unet.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from serve.segment.segmenter import Segmenter
    from serve.volume.request import Request
    from unet.volume import Volume

    # Has shards computed, by their numbers, and tells the number of each that is done.
    Compute = Callable[[ShardWork, Iterable[int], Callable[[int], None]], None]


def compute_here(work: ShardWork, numbers: Iterable[int], each: Callable[[int], None]) -> None:
    """Compute shards in this process."""
    work.compute(numbers, each)


def segment_shards(segmenter: Segmenter, source: Path, request: Request, compute: Compute = compute_here) -> Summary:
    """Segment this process's share of an OME-Zarr volume, by shards that other processes may share.

    The outputs appear when all shards are done, by whichever process finds that. The bytes do not depend on how many
    there are, nor on the order, nor on which of them were killed.

    Args:
        segmenter: the connection.
        source: the volume, which all processes see, as they see the folder of the outputs.
        request: what is wanted, the same for all but for ``share``.
        compute: has shards computed; by default in this process.

    Raises:
        StackError: if the source cannot be read.
        ClientError: if the server does not answer or refuses, the request does not fit the volume, or the outputs are
            no OME-Zarr. Shards that are done stay so.
    """
    require_shards(request, source)
    check_folders(request, source)
    started = time.perf_counter()
    with open_volume(source) as volume:
        check_volume(volume, request)
        found = _Found()
        try:
            _work(found, volume, segmenter, request, compute)
        except FileNotFoundError:
            if not published_by_another(volume, request, tta=segmenter.settings.tta):
                raise
            found.missing = 0
        except ClientError as error:
            if request.share is None and found.work is not None and "begin anew" not in str(error):
                _keep_or_remove(found.work, error)
            raise
        size = len(volume), volume.height, volume.width
        windows = found.work.run.windows if found.work else windows_of(volume, request)
    outputs = {kind: str(path) for kind, path in request.targets(source).items()}
    counts = len(found.mine), len(found.mine) - len(found.todo), segmenter.resent
    rest = time.perf_counter() - started, found.missing, found.work.run.threshold if found.work else None
    return Summary(str(source), outputs, *size, windows.value, str(windows), *counts, *rest)


@dataclass
class _Found:
    """How far this process has come.

    Attributes:
        work: its hold on the volume, once there is one.
        mine: its share of the shards.
        todo: those of them that were not done before.
        missing: of all shares in the end; 0 once the outputs are published.
    """

    work: ShardWork | None = None
    mine: Sequence[int] = ()
    todo: Sequence[int] = ()
    missing: int = 0


def _work(found: _Found, volume: Volume, segmenter: Segmenter, request: Request, compute: Compute) -> None:
    work = found.work = ShardWork(volume, segmenter, request)
    found.mine = (request.share or Share()).of(len(work.shards))
    found.todo = work.missing(found.mine)
    name = volume.path.name
    with request.progress(len(found.mine), f"shards of {name} segmented", unit="shard", name=name) as progress:
        progress.advance(len(found.mine) - len(found.todo))
        progress.from_here()
        compute(work, found.todo, lambda _: progress.advance())
    found.missing = 0 if work.finish() else work.left()


def _keep_or_remove(work: ShardWork, error: ClientError) -> None:
    """Of a run that failed: say where what it found is, or leave nothing."""
    if work.folder.marked():
        error.args = (f"{error}; what was found so far is in {work.folder.path}, add --resume to go on with it",)
    else:
        work.folder.remove()


def check_folders(request: Request, source: Path) -> None:
    """Refuse to mix what is found by shards with what an interrupted run has found otherwise, before any work.

    Raises:
        ClientError: naming what to do.
    """
    folder, partial = request.shards_folder(source), request.partial_folder(source)
    if request.share is None and folder.exists() and not (request.resume or request.overwrite):
        raise ClientError(
            f"{folder} holds what an interrupted run has found: add --resume to go on with it, or --overwrite to begin "
            "anew"
        )
    if request.share is not None and request.overwrite:
        raise ClientError(
            "--shard throws nothing away, which the other processes may be at work on: remove the former outputs and "
            f"{folder} instead of --overwrite"
        )
    if request.share is not None and partial.exists():
        raise ClientError(
            f"{partial} holds what an interrupted run has found: go on with it without --shard, or remove it"
        )


def goes_on_by_shards(request: Request, source: Path) -> bool:
    """Whether a volume is, or was begun to be, segmented by shards.

    Raises:
        ClientError: there is something, and what becomes of it was not said.
    """
    check_folders(request, source)
    folder = request.shards_folder(source)
    if request.share is not None:
        return True
    if request.resume and folder.exists():
        return True
    if request.overwrite:
        shutil.rmtree(folder, ignore_errors=True)
    begun = (request.partial_folder(source) / JOURNAL).exists() and request.resume
    return request.by_shards and can_be_sharded(request, source) and not begun


def published_by_another(volume: Volume, request: Request, *, tta: bool) -> bool:
    """Whether another process has published the outputs, so that this one's folder vanished under its hands."""
    folder = request.shards_folder(volume.path)
    if folder.exists() and recorded(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # pixels that were written since then
    return is_done(volume, request, tta=tta)
