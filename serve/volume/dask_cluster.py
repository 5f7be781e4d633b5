"""Bands of slices on a Dask cluster: their pixels go to the workers, their probabilities come back."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from serve.segment.answer import check_probabilities
from serve.segment.bands import BAND_PX, Job
from serve.segment.errors import ClientError

if TYPE_CHECKING:
    from serve.segment.connection import Interface
    from serve.segment.segmenter import Segmenter
    from serve.segment.settings import Settings
    from serve.volume.dask_connection import DaskCluster

Answers = list[npt.NDArray[Any]]

# Bands of a task, which a worker keeps under way at the same time.
_MOST_BANDS = 8

# Of a worker's thread: one connection for all of its tasks.
_OWN = threading.local()


def segment_task(settings: Settings, interface: Interface, jobs: list[Job]) -> Answers:
    """Segment some bands on a worker.

    Raises:
        ClientError: if no server answers, or one serves another model.
    """
    try:
        return [rows for _, rows in own_segmenter(settings, interface).segment_bands(jobs)]
    except BaseException:
        close_own()
        raise


def own_segmenter(settings: Settings, interface: Interface) -> Segmenter:
    """The connection that a worker's thread keeps for all of its tasks.

    Raises:
        ClientError: no server answers, or one serves another model.
    """
    from serve.segment.segmenter import Segmenter

    own: Segmenter | None = getattr(_OWN, "segmenter", None)
    if own is None or own.settings != settings:
        close_own()
        own = _OWN.segmenter = Segmenter.with_settings(settings)
    if not own.interface.is_model_of(interface):
        raise ClientError(f"one of {', '.join(settings.urls)} serves another {settings.model_name}")
    return own


def close_own() -> None:
    """Hang up, after a fault."""
    own = getattr(_OWN, "segmenter", None)
    if own is not None:
        _OWN.segmenter = None
        own.close()


class DaskDispatcher:
    """Segments bands on a cluster as a segmenter does on its servers."""

    def __init__(self, cluster: DaskCluster, segmenter: Segmenter) -> None:
        """Prepare.

        Args:
            cluster: where.
            segmenter: whose settings and model the workers must have.
        """
        self._cluster, self._interface = cluster, segmenter.interface
        self._settings = worker_settings(segmenter)
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
        with self._cluster.connected() as client:
            tasks = itertools.chain([first], groups)
            for group, future in self._cluster.stream(client, tasks, self._submit):
                yield from zip(group, self._result(future, group))

    def _submit(self, group: list[Job]) -> tuple[Any, ...]:
        return segment_task, self._settings, self._interface, group

    def _result(self, future: Any, group: list[Job]) -> Answers:
        page, address = group[0].page, self._cluster.address
        answers: Answers = self._cluster.result(future, f"slice {page}")
        for job, rows in zip(group, answers):
            shape = (job.band.row1 - job.band.row0, job.image.shape[1])
            check_probabilities(rows, shape, self._dtype, f"a worker of the Dask cluster at {address}")
        if len(answers) != len(group):
            raise ClientError(f"slice {page} came back incomplete from the Dask cluster at {address}")
        return answers


def worker_settings(segmenter: Segmenter) -> Settings:
    """How workers reach the servers: as this process does, and for the same version of the model."""
    return replace(segmenter.settings, model_version=segmenter.interface.version)


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
