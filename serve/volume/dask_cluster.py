"""Bands of slices on a Dask cluster: their pixels go to the workers, their probabilities come back."""

from __future__ import annotations

import contextlib
import itertools
import logging
import queue
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from serve.segment.answer import check_probabilities
from serve.segment.bands import BAND_PX, Job
from serve.segment.errors import ClientError
from unet.errors import UnetError

if TYPE_CHECKING:
    from serve.segment.connection import Interface
    from serve.segment.segmenter import Segmenter
    from serve.segment.settings import Settings

Answers = list[npt.NDArray[Any]]

# Tasks of a worker's thread that wait for it, so that a volume of any size takes a bounded memory.
_TASKS_AHEAD = 3
# Bands of a task, which a worker keeps under way at the same time.
_MOST_BANDS = 8
_CONNECT_TIMEOUT_S = 5
_LOOK_S = 1.0

# Of a worker's thread: one connection for all of its tasks.
_OWN = threading.local()


def segment_task(settings: Settings, interface: Interface, jobs: list[Job]) -> Answers:
    """Segment some bands on a worker.

    Raises:
        ClientError: if no server answers, or one serves another model.
    """
    try:
        return [rows for _, rows in _own_segmenter(settings, interface).segment_bands(jobs)]
    except BaseException:
        _close_own()
        raise


def _own_segmenter(settings: Settings, interface: Interface) -> Segmenter:
    from serve.segment.segmenter import Segmenter

    own: Segmenter | None = getattr(_OWN, "segmenter", None)
    if own is None or own.settings != settings:
        _close_own()
        own = _OWN.segmenter = Segmenter.with_settings(settings)
    if not own.interface.is_model_of(interface):
        raise ClientError(f"one of {', '.join(settings.urls)} serves another {settings.model_name}")
    return own


def _close_own() -> None:
    own = getattr(_OWN, "segmenter", None)
    if own is not None:
        _OWN.segmenter = None
        own.close()


class DaskDispatcher:
    """Segments bands on a cluster as a segmenter does on its servers."""

    def __init__(self, address: str, segmenter: Segmenter) -> None:
        """Prepare.

        Args:
            address: of the cluster's scheduler.
            segmenter: whose settings and model the workers must have.
        """
        self._address, self._interface = address, segmenter.interface
        self._settings = replace(segmenter.settings, model_version=segmenter.interface.version)
        self._dtype = segmenter.probability_dtype

    def segment_bands(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, npt.NDArray[Any]]]:
        """The probabilities of bands of slices, in the order in which they are finished.

        Args:
            jobs: they are taken one by one, as the workers need them.

        Raises:
            ClientError: if there is no such cluster, it has no workers, or a band cannot be computed.
        """
        groups = _groups(jobs)
        first = next(groups, None)
        if first is None:
            return
        distributed = _distributed()
        try:
            cluster = distributed.Client(self._address, timeout=_CONNECT_TIMEOUT_S, set_as_default=False)
        except (OSError, ValueError) as error:
            raise ClientError(
                f"no Dask scheduler answers at {self._address}: start one, or name it with --dask"
            ) from error
        try:
            yield from self._through(cluster, itertools.chain([first], groups))
        finally:
            with contextlib.suppress(Exception):  # it may be gone
                cluster.close(timeout=_CONNECT_TIMEOUT_S)

    def _through(self, cluster: Any, groups: Iterator[list[Job]]) -> Iterator[tuple[Job, npt.NDArray[Any]]]:
        ahead = _TASKS_AHEAD * sum(cluster.nthreads().values())
        if not ahead:
            raise ClientError(f"the Dask scheduler at {self._address} has no workers: start some")
        under_way: dict[Any, list[Job]] = {}
        finished: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def begin(count: int) -> None:
            for group in itertools.islice(groups, count):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that a task carries its pixels
                    future = cluster.submit(segment_task, self._settings, self._interface, group, pure=False)
                under_way[future] = group
                future.add_done_callback(finished.put)

        begin(ahead)
        while under_way:
            future = self._next_finished(cluster, finished)
            group = under_way.pop(future)
            yield from zip(group, self._result(future, group))
            begin(1)

    def _next_finished(self, cluster: Any, finished: queue.SimpleQueue[Any]) -> Any:
        alone_since: float | None = None
        while True:
            try:
                return finished.get(timeout=_LOOK_S)
            except queue.Empty:
                pass
            if cluster.status != "running":
                raise self._gone()
            if self._has_workers(cluster):
                alone_since = None
                continue
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > self._settings.patience_s:
                raise ClientError(f"all workers of the Dask scheduler at {self._address} are gone: start some")

    def _has_workers(self, cluster: Any) -> bool:
        try:
            return bool(cluster.nthreads())
        except Exception as error:
            raise self._gone() from error

    def _gone(self) -> ClientError:
        return ClientError(f"the Dask scheduler at {self._address} has gone: start it again")

    def _result(self, future: Any, group: list[Job]) -> Answers:
        page = group[0].page
        if future.status == "cancelled":
            raise self._gone()
        try:
            answers: Answers = future.result()
        except UnetError:
            raise
        except Exception as error:  # whatever a worker met, down to its own end
            said = (str(error).splitlines() or [type(error).__name__])[0]
            raise ClientError(f"slice {page} failed on the Dask cluster at {self._address}: {said}") from error
        for job, rows in zip(group, answers):
            shape = (job.band.row1 - job.band.row0, job.image.shape[1])
            check_probabilities(rows, shape, self._dtype, f"a worker of the Dask cluster at {self._address}")
        if len(answers) != len(group):
            raise ClientError(f"slice {page} came back incomplete from the Dask cluster at {self._address}")
        return answers


def _groups(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Jobs in groups of a bounded number of bands and pixels."""
    group: list[Job] = []
    for job in jobs:
        group.append(job)
        if len(group) == _MOST_BANDS or sum(each.image.size for each in group) >= BAND_PX:
            yield group
            group = []
    if group:
        yield group


def _distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ClientError("Dask is not installed: pip install 'unet-medical-triton[dask]'") from error
    # What it logs of lost connections the errors here say in one sentence.
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    return distributed
