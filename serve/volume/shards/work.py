"""Shards of one volume at work: read, segmented, written, marked; and the outputs published when all are there."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, Any

from serve.segment.errors import ClientError
from serve.volume.outputs import PICTURE, Output
from serve.volume.partial import RawStore
from serve.volume.run import windows_of
from serve.volume.scale import as_seen
from serve.volume.shards.folder import ShardFolder, recorded
from serve.volume.shards.plan import Shard, require_shards, shards_of
from serve.volume.work import PICTURE_FILE, Run, draw, slice_mark
from unet.errors import warn
from unet.intensity import Windows
from unet.volume.overlay import made_by
from unet.volume.scaled import Planes, ScaledRows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    import numpy.typing as npt

    from serve.segment.bands import Band
    from serve.segment.segmenter import Segmenter
    from serve.volume.request import Request
    from unet.volume import Volume

_STRAY = ".partial"


class _Slice:
    """The probabilities of the slice under way, for what needs it whole."""

    def __init__(self, store: RawStore) -> None:
        self._store = store

    def write(self, row0: int, rows: npt.NDArray[Any]) -> None:
        self._store.write(0, row0, rows)

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows of the slice, whatever its number."""
        return self._store.read(0, row0, row1)


class ShardWork:
    """One process's hold on a volume that several share.

    Attributes:
        run: the volume and what is wanted of it.
        shards: the plan.
        folder: with the markers.
    """

    def __init__(self, volume: Volume, segmenter: Segmenter, request: Request) -> None:
        """Begin the plan, or join the one that is there.

        Args:
            volume: open; it stays the caller's to close.
            segmenter: connected.
            request: what is wanted.

        Raises:
            ClientError: the outputs are no OME-Zarr, stand there already, or a plan of something else does.
        """
        require_shards(request, volume.path)
        path = request.shards_folder(volume.path)
        windows = _windows(volume, request, recorded(path))
        seen = as_seen(segmenter, volume, resample=request.resample)
        self.run = Run(volume, seen, request, segmenter, windows)
        self._refuse_others_outputs()
        self.folder = ShardFolder(path, _identity(self.run))
        divisible = "labels" not in request.kinds and not self.run.is_scaled
        pixels = request.shard_mpx * 1e6
        self.shards = shards_of(len(volume), seen.width, self.run.bands, pixels, divisible=divisible)
        self._per_slice = len(self.shards) // len(volume)
        self._outputs = [output for kind in request.kinds if (output := self._output(kind)) is not None]

    def _refuse_others_outputs(self) -> None:
        run = self.run
        for kind, path in run.targets.items():
            if run.request.overwrite or not path.exists():
                continue
            if made_by(path) != run.output_settings.made_by + slice_mark(run.request, kind):
                raise ClientError(f"{path} exists already: remove it, or choose another --output_dir")

    def _output(self, kind: str) -> Output | None:
        """The output under way; None if a process that was killed then has published it."""
        run, target, name = self.run, self.run.targets[kind], f"{kind}.zarr"

        def output(aside: Path, *, keep: bool = False) -> Output:
            return Output(kind, target, aside, run.volume, run.written, run.output_settings, keep=keep)

        if not (self.folder.path / name).exists():
            marked = self.folder.marked()
            if target.exists() and len(marked) >= len(self.shards):
                return None
            if marked and not (self.folder.path / name).exists():
                raise ClientError(f"{self.folder.path} has lost {name}: remove that folder to begin anew")
            self.folder.install(name, lambda aside: output(aside).close())
        return output(self.folder.path, keep=True)

    def missing(self, numbers: Iterable[int]) -> list[int]:
        """Which of some shards are not done yet."""
        marked = self.folder.marked()
        names = ((number, _name(self.shards[number])) for number in numbers)
        return [number for number, name in names if name not in marked or not self.folder.is_marked(name)]

    def left(self) -> int:
        """How many shards of all are not done yet."""
        marked = self.folder.marked()
        return sum(_name(shard) not in marked for shard in self.shards)

    def compute(self, numbers: Iterable[int], each: Callable[[int], None] = lambda number: None) -> None:
        """Compute shards and mark them.

        Args:
            numbers: of shards.
            each: is told the number of one that is done.

        Raises:
            ClientError: the server does not answer or refuses. What is marked stays so.
        """
        todo = [self.shards[number] for number in numbers]
        run = self.run
        jobs = (run.job(page, band) for shard in todo for page, band in shard.units())
        answers = (rows for _, rows in run.segmenter.segment_bands(jobs))
        with contextlib.ExitStack() as stack:
            store = None
            if run.is_scaled or "labels" in run.request.kinds:
                path = stack.enter_context(self.folder.scratch())
                raw = RawStore(path, run.seen.height, run.seen.width, run.segmenter.probability_dtype)
                stack.callback(raw.close)
                store = _Slice(raw)
            for shard in todo:
                for page, band in shard.units():
                    self._write(shard, page, band, next(answers), store)
                for page in range(shard.page0, shard.page1):
                    for output in self._outputs:
                        output.settle(page, run.written if shard.whole else shard.bands, levels=shard.whole)
                self.folder.mark(_name(shard))
                each(shard.number)
        for shard in todo:
            if not shard.whole:
                self._finish_slice(shard.page0)

    def _write(self, shard: Shard, page: int, band: Band, rows: npt.NDArray[Any], store: _Slice | None) -> None:
        run = self.run
        if store is not None:
            store.write(band.row0, rows)
        if not run.is_scaled:
            for output in self._outputs:
                output.write(page, band.row0, rows)
        if not shard.whole or band is not shard.bands[-1]:
            return
        found: Planes | None = store
        if run.is_scaled:
            assert store is not None
            size = run.volume.height, run.volume.width
            found = ScaledRows(store, (run.seen.height, run.seen.width), size)
            for part in run.written:
                for output in self._outputs:
                    output.write(page, part.row0, found.read(page, part.row0, part.row1))
        for output in self._outputs:
            output.finish_page(page, found if found is not None else output)

    def _finish_slice(self, page: int) -> None:
        """Write the smaller levels of a slice of several shards, by whoever finds all of them done."""
        name = f"slice-{page}"
        parts = self.shards[page * self._per_slice : (page + 1) * self._per_slice]
        if self.folder.is_marked(name) or not all(self.folder.is_marked(_name(part)) for part in parts):
            return
        for output in self._outputs:
            output.finish_page(page, output)
            output.settle(page, self.run.written, levels=True)
        self.folder.mark(name)

    def finish(self) -> bool:
        """Publish the outputs if all shards are done; several processes may try.

        Returns:
            Whether they are published.

        Raises:
            ClientError: the volume was changed meanwhile.
        """
        if not self.folder.path.exists():
            return True
        if self.left():
            return False
        with self.folder.alone() as still_there:
            if still_there:
                self._publish()
        return True

    def _publish(self) -> None:
        run, path = self.run, self.folder.path
        if torn := self.missing(range(len(self.shards))):
            raise ClientError(f"{path} has {len(torn)} markers of another plan: remove that folder to begin anew")
        if run.volume.changed():
            raise ClientError(
                f"{run.volume.path} was changed or replaced while it was read, so that the result may be of two "
                f"stacks: remove {path} and begin anew"
            )
        for page in range(len(run.volume)) if not self.shards[0].whole else ():
            self._finish_slice(page)
        if run.request.picture_slice is not None and not run.targets[PICTURE].exists():
            probability = self._outputs[run.request.kinds.index("probability")]
            with self.folder.scratch() as aside:
                draw(run, run.request.picture_slice, probability, aside)
                os.replace(aside, path / PICTURE_FILE)
            os.replace(path / PICTURE_FILE, run.targets[PICTURE])
        for output in self._outputs:
            if (path / f"{output.kind}.zarr").exists():
                _sweep(path / f"{output.kind}.zarr")
                output.publish()
        self.folder.remove()


def _name(shard: Shard) -> str:
    return f"{shard.number:08d}"


def _windows(volume: Volume, request: Request, plan: dict[str, Any] | None) -> Windows:
    """The plan's own windows where it is of this volume, so that its pixels are looked through once."""
    if plan and plan.get("input") == volume.fingerprint() and plan.get("chosen_window") == _chosen(request):
        each = plan["windows"]["each"]
        windows = tuple(None if one is None else (one[0], one[1]) for one in each)
        if len(windows) == 1:
            windows *= len(volume)
        return Windows(windows, plan["windows"]["shared_by"])
    windows_found = windows_of(volume, request)
    for note in windows_found.notes:
        warn(note)
    return windows_found


def _chosen(request: Request) -> Any:
    return list(request.window) if isinstance(request.window, tuple) else request.window


def _identity(run: Run) -> dict[str, Any]:
    """All that the bytes of the outputs depend on."""
    request, served = run.request, run.segmenter.interface
    each = run.windows.each[:1] if len(set(run.windows.each)) == 1 else run.windows.each
    return {
        **run.header,
        "model_name": run.segmenter.settings.model_name,
        "model_version": served.version,
        "chosen_window": _chosen(request),
        "windows": {"each": each, "shared_by": run.windows.shared_by},
        "output": list(request.kinds),
        "label_dtype": request.label_dtype,
        "agglomerate": request.agglomerate,
        "picture_slice": request.picture_slice,
        "shard_mpx": request.shard_mpx,
        "settings": run.output_settings.made_by,
    }


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed had not written whole."""
    for item in folder.iterdir():
        if item.is_dir():
            _sweep(item)
        elif item.name.endswith(_STRAY):
            item.unlink()
