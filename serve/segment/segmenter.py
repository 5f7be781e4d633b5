"""Slices through a served U-Net: tiles out, probabilities back, several requests in flight."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.bands import Job, band_of, turned, turned_back
from serve.segment.dispatch import Batch, Dispatcher
from serve.segment.errors import ClientError
from serve.segment.settings import DEFAULT_URL, Settings
from unet.geometry import HALO, TilePlan, cheapest_tile_size, gather, mirrored_indices, plan_tiles
from unet.intensity import Window, to_uint8
from unet.tracing import span

if TYPE_CHECKING:
    from serve.segment.connection import Interface
    from unet.geometry import Tile

VIEWS = 8
# A float16 of at most 1 is a whole multiple of this, so that sums of them are exact and their order does not matter.
_STEPS = 2**24


@dataclass
class _Work:
    """A band whose tiles are under way.

    Attributes:
        job: what was asked for.
        image: its pixels in 8 bits.
        result: what is put together.
        views: of each tile.
        missing: answers that have not come yet.
    """

    job: Job
    image: npt.NDArray[np.uint8]
    result: npt.NDArray[Any]
    views: int
    missing: int
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fill(self, tile: Tile, view: int, into: npt.NDArray[np.uint8]) -> None:
        """Put a tile, as seen in a view, into uint8 [S, S]."""
        rows = mirrored_indices(tile.row0 - HALO, tile.size, self.job.height) - self.job.first_row
        cols = mirrored_indices(tile.col0 - HALO, tile.size, self.image.shape[1])
        into[...] = turned(gather(self.image, rows, cols), view)

    def accept(self, tile: Tile, view: int, output: npt.NDArray[np.float16]) -> None:
        """Place an answer, float16 [S - 184, S - 184]."""
        rows, cols = tile.write
        into = self.result[rows.start - self.job.band.row0 : rows.stop - self.job.band.row0, cols]
        answer = turned_back(output, view)[tile.source]
        if self.views == 1:
            into[...] = answer
        with self.lock:
            if self.views > 1:
                into += (answer.astype(np.float32) * np.float32(_STEPS)).astype(np.int32)
            self.missing -= 1

    def probability(self) -> npt.NDArray[Any]:
        """The finished rows: float16, or float32 where several views were taken the mean of."""
        if self.views == 1:
            return self.result
        return (self.result / (self.views * _STEPS)).astype(np.float32)


# A tile of a band, and how it is seen.
_Part = tuple[_Work, "Tile", int]


def _fill(parts: Sequence[_Part], images: npt.NDArray[np.uint8]) -> None:
    with span("cut", tiles=len(parts)):
        for image, (work, tile, view) in zip(images, parts):
            work.fill(tile, view, image[0])


def _accept(parts: Sequence[_Part], outputs: npt.NDArray[np.float16]) -> None:
    for output, (work, tile, view) in zip(outputs, parts):
        work.accept(tile, view, output[0])


class Segmenter:
    """A connection to one served model.

    Use it as a context manager, from one thread::

        with Segmenter() as segmenter:
            probability = segmenter.segment_slice(image)

    Several servers share the load. A request that got no usable answer is sent again where that can help: to a server
    whose queue was full, to one that came back, to another one. After an error it can be used again.

    Attributes:
        settings: how slices are sent.
    """

    def __init__(
        self, url: str | Sequence[str] = DEFAULT_URL, model_name: str = Settings.model_name, **options: Any
    ) -> None:
        """Connect and ask for the model's interface.

        Args:
            url: host and port of the server's gRPC, or of several servers, which share the load.
            model_name: the served model.
            **options: the other attributes of `settings.Settings` by name, such as ``timeout_s`` or ``tls``.

        Raises:
            ClientError: if no server answers, it does not serve the model, or the model has another interface.
        """
        self._connect(Settings.of(url, {"model_name": model_name, **options}))

    @classmethod
    def with_settings(cls, settings: Settings) -> Segmenter:
        """A segmenter as the constructor makes it, from settings as they are.

        Raises:
            ClientError: as the constructor.
        """
        segmenter = cls.__new__(cls)
        segmenter._connect(settings)
        return segmenter

    def _connect(self, settings: Settings) -> None:
        self.settings = settings
        self._views = VIEWS if self.settings.tta else 1
        self._dispatcher = Dispatcher(self.settings)
        if self.settings.batch_size > self.interface.max_batch_size:
            self.close()
            raise ClientError(
                f"a batch of {self.settings.batch_size} is more than the {self.interface.max_batch_size} that "
                f"{self.settings.model_name} takes"
            )

    @property
    def interface(self) -> Interface:
        """What the served model takes, and which version it is."""
        return self._dispatcher.pool.interface

    @property
    def probability_dtype(self) -> np.dtype[Any]:
        """Of the rows that ``segment_bands`` gives: float16, with ``tta`` float32."""
        return np.dtype(np.float16 if self._views == 1 else np.float32)

    @property
    def resent(self) -> int:
        """How many requests were sent once more."""
        return self._dispatcher.resent

    def plan(self, height: int, width: int) -> TilePlan:
        """The cheapest cover of a slice that the served model allows."""
        return plan_tiles(height, width, cheapest_tile_size(height, width, self.interface.tile_sizes))

    def segment_slice(self, image: npt.NDArray[Any], window: Window | None = None) -> npt.NDArray[np.float32]:
        """The probability of "not membrane" of one slice: uint8 [H, W] to float32 [H, W].

        Args:
            image: uint8, or with a window uint16.
            window: the intensities that become 0 and 255.

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        return next(self.segment([image], window))

    def segment(
        self, slices: Iterable[npt.NDArray[Any]], window: Window | None = None
    ) -> Iterator[npt.NDArray[np.float32]]:
        """The probabilities of several slices, in order; the next slices are under way while one is given out.

        Args:
            slices: uint8 [H, W] each, or with a window uint16; they are taken one by one, a few ahead.
            window: the intensities that become 0 and 255.

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        for _, probability in self.segment_bands((self._whole(image, window) for image in slices), window):
            yield probability.astype(np.float32, copy=False)

    def _whole(self, image: npt.NDArray[Any], window: Window | None) -> Job:
        fits = image.dtype == np.uint8 or (image.dtype == np.uint16 and window is not None)
        if image.ndim != 2 or not fits:
            raise ClientError(
                f"a slice must be uint8 [H, W], or uint16 with a window: this is {image.dtype} {list(image.shape)}"
            )
        plan = self.plan(*image.shape)
        return Job(0, band_of(plan, plan.tiles), plan.tile_size, image, 0, image.shape[0])

    def segment_bands(
        self, jobs: Iterable[Job], window: Window | None = None
    ) -> Iterator[tuple[Job, npt.NDArray[Any]]]:
        """The probabilities of bands of slices, in order.

        Args:
            jobs: they are taken one by one, a few ahead.
            window: the intensities that become 0 and 255; uint16 needs one.

        Returns:
            Each job with its rows, of ``probability_dtype``.

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        works: deque[_Work] = deque()
        batches: deque[Batch] = deque()
        parts: list[_Part] = []
        try:
            for job in jobs:
                works.append(self._begin(job, window))
                for part in self._parts(works[-1]):
                    if parts and parts[0][1].size != part[1].size:
                        self._submit(parts, batches)
                    parts.append(part)
                    if len(parts) == self.settings.batch_size:
                        self._submit(parts, batches)
                # One request that takes long must not let finished slices pile up behind it.
                while works and (works[0].missing == 0 or len(works) > self._ahead(works[0])):
                    yield self._finished(works, parts, batches)
            while works:
                yield self._finished(works, parts, batches)
        finally:
            for batch in batches:
                batch.wanted = False

    def _begin(self, job: Job, window: Window | None) -> _Work:
        dtype = np.float16 if self._views == 1 else np.int32
        result = np.zeros((job.band.row1 - job.band.row0, job.image.shape[1]), dtype)
        return _Work(job, to_uint8(job.image, window), result, self._views, len(job.band.tiles) * self._views)

    def _parts(self, work: _Work) -> Iterator[_Part]:
        return ((work, tile, view) for tile in work.job.band.tiles for view in range(self._views))

    def _ahead(self, work: _Work) -> int:
        """Bands that may be under way: as many as keep all servers busy."""
        requests = self.settings.in_flight * len(self.settings.urls)
        return requests * -(-self.settings.batch_size // (len(work.job.band.tiles) * self._views))

    def _submit(self, parts: list[_Part], batches: deque[Batch]) -> None:
        """Send what has been gathered as one request."""
        size, batch_size = parts[0][1].size, self.settings.batch_size
        batch = Batch(len(parts), partial(_fill, parts[:]), partial(_accept, parts[:]))
        parts.clear()
        batches.append(batch)
        self._dispatcher.submit(batch, (batch_size, 1, size, size))

    def _finished(self, works: deque[_Work], parts: list[_Part], batches: deque[Batch]) -> tuple[Job, npt.NDArray[Any]]:
        if any(work is works[0] for work, _, _ in parts):
            self._submit(parts, batches)
        self._dispatcher.wait_for(lambda: works[0].missing == 0)
        # Batches refer to bands: their pixels go with the last reference, not at some collection.
        while batches and batches[0].answered:
            batches.popleft()
        work = works.popleft()
        return work.job, work.probability()

    def close(self) -> None:
        """Give up what is under way, have the server forget the shared memory, and hang up."""
        self._dispatcher.close()

    def __enter__(self) -> Segmenter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
