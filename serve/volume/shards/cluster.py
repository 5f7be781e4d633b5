"""Shards on a Dask cluster: numbers go to the workers, which read and write the shared disk themselves."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from serve.segment.errors import ClientError
from serve.volume.dask_cluster import close_own, own_segmenter, worker_settings
from serve.volume.shards.work import ShardWork
from unet.volume import open_volume
from unet.volume.ngff.remote import remote_address

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from serve.segment.connection import Interface
    from serve.segment.settings import Settings
    from serve.volume.dask_connection import DaskCluster
    from serve.volume.request import Request

# Of a task: enough to keep a worker's requests under way, few enough that all workers end at about the same time.
_MOST_SHARDS = 16

# Of a worker's thread: the volume that it is at work on.
_OWN = threading.local()


def shards_task(
    settings: Settings, interface: Interface, source: Path, request: Request, mark: str, numbers: list[int]
) -> list[int]:
    """Compute some shards on a worker, those that are not done yet.

    Returns:
        The numbers of those that are done.

    Raises:
        ClientError: no server answers, or the worker does not see the volume or the folder of the outputs as the
            client does.
    """
    try:
        work = _own_work(settings, interface, source, request, mark)
        work.compute(work.missing(numbers))
    except BaseException:
        _close_work()
        close_own()
        raise
    return numbers


def _own_work(settings: Settings, interface: Interface, source: Path, request: Request, mark: str) -> ShardWork:
    segmenter = own_segmenter(settings, interface)
    key = (segmenter, source, request, mark)
    if getattr(_OWN, "key", None) != key:
        _close_work()
        if not request.shards_folder(source).exists():
            raise ClientError(
                f"a worker does not see {request.shards_folder(source)}: volume and outputs must lie on a disk that "
                "all workers share, under the same path"
            )
        _OWN.volume = open_volume(source)
        _OWN.work = ShardWork(_OWN.volume, segmenter, request)
        if _OWN.work.folder.identity != mark:
            raise ClientError(f"a worker sees another {source} than the client: both must see one shared disk")
        _OWN.key = key
    work: ShardWork = _OWN.work
    return work


def _close_work() -> None:
    volume = getattr(_OWN, "volume", None)
    _OWN.key = _OWN.work = _OWN.volume = None
    if volume is not None:
        volume.close()


class DaskShards:
    """Has shards computed by a cluster."""

    def __init__(self, cluster: DaskCluster) -> None:
        self._cluster = cluster

    def compute(self, work: ShardWork, numbers: Iterable[int], each: Callable[[int], None]) -> None:
        """Have shards computed and marked; what killed workers leave is given to others as long as that helps.

        Raises:
            ClientError: there is no such cluster, it has no workers, or shards cannot be computed.
        """
        todo = list(numbers)
        if not todo:
            return
        with self._cluster.connected() as client:
            while todo:
                fault = self._pass(client, work, todo, each)
                left = work.missing(todo)
                if len(left) == len(todo):
                    raise fault or ClientError(
                        f"shard {left[0]} is not done, though a worker said so: look at its disk"
                    )
                todo = left

    def _pass(self, client: Any, work: ShardWork, todo: list[int], each: Callable[[int], None]) -> ClientError | None:
        """Give all shards out once; returns what killed workers left, as the fault of the last of them."""
        run, fault = work.run, None
        # Workers may have been started in another folder.
        source = run.volume.path if remote_address(run.volume.path) else run.volume.path.absolute()
        request = replace(run.request, folder=work.folder.path.parent.absolute())
        settings = worker_settings(run.segmenter)

        def submit(numbers: list[int]) -> tuple[Any, ...]:
            return shards_task, settings, run.segmenter.interface, source, request, work.folder.identity, numbers

        for numbers, future in self._cluster.stream(client, _batches(todo), submit):
            if future.status == "error" and type(future.exception()).__name__ == "KilledWorker":
                fault = ClientError(
                    f"each worker that had the shards {numbers[0]} to {numbers[-1]} died: look at the workers' logs, "
                    "most often for want of memory"
                )
                continue
            for number in self._cluster.result(future, f"shard {numbers[0]}"):
                each(number)
        return fault


def _batches(todo: list[int]) -> Iterator[list[int]]:
    count = max(1, min(_MOST_SHARDS, len(todo) // 64))
    return (todo[first : first + count] for first in range(0, len(todo), count))
