"""An OME-Zarr volume segmented by a Dask cluster: bands of slices with their halos, one task each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.segment.errors import ClientError
from serve.volume.partial import checksum
from unet.errors import UnetError
from unet.volume import ZarrCanvas, ZarrStack
from unet.volume.opening import split_inner

if TYPE_CHECKING:
    from serve.segment.bands import Band
    from serve.segment.segmenter import Segmenter
    from serve.volume.work import Run
    from unet.geometry import TilePlan
    from unet.intensity import Windows

# Tasks of a worker's thread that wait for it, so that a volume of any size has a bounded graph.
_TASKS_AHEAD = 4
_CONNECT_TIMEOUT_S = 5


@dataclass(frozen=True)
class Work:
    """How a worker's segmenter connects: the servers, and the other arguments of ``Segmenter`` by name."""

    urls: tuple[str, ...]
    options: dict[str, Any]

    def connect(self, turn: int) -> Segmenter:
        """A segmenter whose first server is the ``turn``-th, so that workers share the servers out."""
        from serve.segment.segmenter import Segmenter

        first = turn % len(self.urls)
        return Segmenter((*self.urls[first:], *self.urls[:first]), **self.options)


@dataclass(frozen=True)
class Place:
    """What a task needs to know beside its band."""

    source: str
    store: str
    windows: Windows
    plan: TilePlan
    work: Work
    interface: str
    turns: dict[str, int]


def segment_task(place: Place, page: int, band: Band) -> int:
    """Segment one band on a worker, write it into the store, and give the CRC-32 of its pixels.

    Raises:
        ClientError: if no server answers, or one serves another model.
    """
    from serve.volume.work import job_of

    turn = place.turns.get(str(_distributed().get_worker().address), 0)
    folder, inner = split_inner(Path(place.source))
    with ZarrStack(folder, inner=inner) as volume, place.work.connect(turn) as segmenter:
        if repr(segmenter.interface) != place.interface:
            name = place.work.options["model_name"]
            raise ClientError(f"one of {', '.join(place.work.urls)} serves another {name}")
        job = job_of(volume, place.windows, place.plan, page, band)
        [(_, rows)] = segmenter.segment_bands([job])
        ZarrCanvas(place.store, volume, rows.dtype, chunk_rows=1, keep=True).write(page, band.row0, rows)
    return checksum(rows)


class DaskFiller:
    """Has a cluster compute the bands that are missing; a run that was interrupted goes on with the others."""

    def __init__(self, address: str, work: Work) -> None:
        self.address, self.work = address, work

    def __call__(self, run: Run, missing: list[tuple[int, Band]]) -> None:
        """Compute bands into the run's store.

        Raises:
            ClientError: if there is no such cluster, it has no workers, or a band cannot be computed.
        """
        if not missing:
            return
        distributed = _distributed()
        try:
            cluster = distributed.Client(self.address, timeout=_CONNECT_TIMEOUT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClientError(
                f"no Dask scheduler answers at {self.address}: start one, or name it with --dask"
            ) from error
        with cluster:
            threads: dict[str, int] = cluster.nthreads()
            if not threads:
                raise ClientError(f"the Dask scheduler at {self.address} has no workers: start some")
            place = cluster.scatter(self._place(run, sorted(threads)), broadcast=True, hash=False)
            self._fill(distributed, cluster, place, run, missing, _TASKS_AHEAD * sum(threads.values()))

    def _fill(
        self, distributed: Any, cluster: Any, place: Any, run: Run, missing: list[tuple[int, Band]], ahead: int
    ) -> None:
        under_way: dict[Any, tuple[int, Band]] = {}
        finished = distributed.as_completed(loop=cluster.loop)
        waiting = iter(missing)

        def begin(count: int) -> None:
            for page, band in itertools.islice(waiting, count):
                future = cluster.submit(segment_task, place, page, band, pure=False)
                under_way[future] = page, band
                finished.add(future)

        begin(ahead)
        for future in finished:
            page, band = under_way.pop(future)
            try:
                crc = int(future.result())
            except UnetError:
                raise
            except Exception as error:  # whatever a worker met, down to its own end
                raise ClientError(f"slice {page} failed on the Dask cluster at {self.address}: {error}") from error
            run.partial.mark(page, band.row0, crc)
            begin(1)

    def _place(self, run: Run, workers: list[str]) -> Place:
        with self.work.connect(0) as segmenter:
            interface = repr(segmenter.interface)
        return Place(
            str(Path(run.volume.path).resolve()),
            str((run.partial.folder / "probability.store").resolve()),
            run.windows,
            run.plan,
            self.work,
            interface,
            {address: turn for turn, address in enumerate(workers)},
        )


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ClientError("Dask is not installed: pip install 'unet-medical-triton[dask]'") from error
    return distributed
