"""The levels of the benchmark: the engine alone, Triton by gRPC and by shared memory, and perf_analyzer.

A level has a name, keeps a load up for some seconds, and returns a sample.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from serve.measure.meter import Cost, Meter, ServerCounts
from serve.measure.perf_analyzer import PerfAnalyzer, PerfRow
from serve.segment.connection import Connection, Interface
from serve.segment.cuda_slot import CudaSlot
from serve.segment.errors import ClientError
from serve.segment.slot import SharedSlot, Slot
from serve.segment.slots import make_slots

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Infer = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float16]]
# Names of levels by the kind of memory that carries their requests, the fastest first.
WAYS = {CudaSlot: "CUDA shared memory", SharedSlot: "shared memory", Slot: "gRPC"}
# A slow level answers at least this many requests, even if that takes longer than it should.
_LEAST_REQUESTS = 2


@dataclass(frozen=True)
class Load:
    """What a level is asked: how many requests at a time, each with a batch of square tiles."""

    tile_size: int
    batch_size: int
    concurrency: int = 1

    def images(self) -> npt.NDArray[np.uint8]:
        """Noise, uint8 [N, 1, S, S]; the network needs the same time for any image."""
        shape = (self.batch_size, 1, self.tile_size, self.tile_size)
        return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@dataclass(frozen=True)
class Sample:
    """The result of one level in one round.

    Attributes:
        images: answered.
        wall_s: time for them, in seconds. For perf_analyzer, which also starts and warms up, only the rate is right.
        latencies_s: of each request; empty for perf_analyzer, which does not report them.
        server: what the server counted meanwhile, None without one.
        cost: what it took, None where it was not measured.
        perf: perf_analyzer's own row.
        cached: requests that the server's response cache answered.
    """

    images: float
    wall_s: float
    latencies_s: tuple[float, ...] = ()
    server: ServerCounts | None = None
    cost: Cost | None = None
    perf: PerfRow | None = None
    cached: int = 0

    @property
    def img_per_s(self) -> float:
        """Images over wall time."""
        return self.images / self.wall_s


def make_distinct(images: npt.NDArray[np.uint8]) -> None:
    """Change the first pixels of a request at random, so that a response cache never has its answer."""
    images.reshape(-1)[:8] = np.frombuffer(os.urandom(8), np.uint8)


class Level(Protocol):
    """One way from tiles to probabilities."""

    name: str

    def measure(self, load: Load, seconds: float) -> Sample:
        """Keep up the load for some seconds, and for at least two requests."""


def timed_requests(send: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each of several calls, one after another."""
    latencies_s: list[float] = []
    started = now = time.perf_counter()
    while now - started < seconds or len(latencies_s) < _LEAST_REQUESTS:
        send()
        latencies_s.append(time.perf_counter() - now)
        now = time.perf_counter()
    return latencies_s


class EngineLevel:
    """The served engine alone in this process: the base that the other levels are compared with."""

    name = "engine"

    def __init__(self, infer: Infer, meter: Meter) -> None:
        self._infer, self._meter = infer, meter

    def measure(self, load: Load, seconds: float) -> Sample:
        """One pass after another, whatever the concurrency: the engine takes one batch at a time."""
        images = load.images()
        self._infer(images)
        with self._meter.measure() as cost:
            latencies_s = timed_requests(lambda: self._infer(images), seconds)
        return Sample(load.batch_size * len(latencies_s), sum(latencies_s), tuple(latencies_s), cost=cost)


class TritonLevel:
    """Triton by tritonclient's gRPC, the pixels sent or in shared memory.

    Args:
        kind: of memory that carries the pixels.
        url: the server's address.
        model: the served model.
        timeout_s: longest wait for an answer.
        meter: of that server.
    """

    def __init__(self, kind: type[Slot], url: str, model: str, timeout_s: float, meter: Meter) -> None:
        self.name = WAYS[kind]
        self._kind, self._url, self._model, self._timeout_s = kind, url, model, timeout_s
        self._meter = meter

    def measure(self, load: Load, seconds: float) -> Sample:
        """One thread for each concurrent request, each with its own connection.

        Raises:
            ClientError: the server does not answer or refuses.
        """
        images, count = load.images(), load.concurrency
        taken: list[list[float]] = [[] for _ in range(count)]
        failures: list[Exception] = []
        ready, go = threading.Barrier(count + 1), threading.Barrier(count + 1)

        def client(index: int) -> None:
            try:
                with self._sender(images) as send:
                    send()
                    ready.wait()
                    go.wait()
                    taken[index] = timed_requests(send, seconds)
            except threading.BrokenBarrierError:
                pass
            except Exception as error:
                failures.append(error)
                ready.abort()
                go.abort()

        threads = [threading.Thread(target=client, args=(index,), daemon=True) for index in range(count)]
        connection = Connection(self._url, self._model, "", self._timeout_s)
        try:
            unused = ServerCounts.read(connection)
            for thread in threads:
                thread.start()
            with contextlib.suppress(threading.BrokenBarrierError):
                ready.wait()
                before = ServerCounts.read_after(connection, unused, count)
                with self._meter.measure() as cost:
                    started = time.perf_counter()
                    go.wait()
                    for thread in threads:
                        thread.join()
                    wall_s = time.perf_counter() - started
                sent = sum(map(len, taken))
                counts = ServerCounts.read_after(connection, before, sent).since(before)
        finally:
            connection.close()
        if failures:
            raise failures[0]
        latencies_s = tuple(latency for each in taken for latency in each)
        return Sample(load.batch_size * len(latencies_s), wall_s, latencies_s, counts, cost, cached=counts.cached)

    @contextlib.contextmanager
    def _sender(self, images: npt.NDArray[np.uint8]) -> Any:
        """A function that sends the batch and waits for its answer."""
        connection = Connection(self._url, self._model, "", self._timeout_s)
        try:
            shape = (images.shape[0], images.shape[1], images.shape[2], images.shape[3])
            slot = make_slots(connection, 1, shape, self._kind, insist=True)[0]
            try:

                def send() -> None:
                    slot.images[...] = images
                    make_distinct(slot.images)
                    answer = connection.infer(*slot.tensors(connection.grpc, len(images)))
                    slot.outputs(answer, len(images))

                yield send
            finally:
                slot.close()
        finally:
            connection.close()


class PerfAnalyzerLevel:
    """NVIDIA's perf_analyzer on the same server, with the same load.

    Args:
        analyzer: the program.
        kind: of memory that carries its pixels.
        url: the server's address.
        model: the served model.
        timeout_s: longest run.
        meter: of that server.
    """

    name = "perf_analyzer"

    def __init__(
        self, analyzer: PerfAnalyzer, kind: type[Slot], url: str, model: str, timeout_s: float, meter: Meter
    ) -> None:
        self._analyzer, self._memory, self._url, self._model = analyzer, kind.memory, url, model
        self._timeout_s, self._meter = timeout_s, meter
        self._ours = TritonLevel(kind, url, model, timeout_s, meter)
        self._rates: dict[Load, float] = {}

    def measure(self, load: Load, seconds: float) -> Sample:
        """Three of its windows; together they last about as long as asked.

        It sends the same tiles again and again, which a response cache answers: the sample then says so.

        Raises:
            MeasureError: it fails.
        """
        # It takes a number of requests for each of its three windows.
        if load not in self._rates:
            self._rates[load] = self._ours.measure(load, 0.0).img_per_s / load.batch_size
        wanted = self._rates[load] * seconds / 3
        started = time.perf_counter()
        with counted(self._url, self._model, self._timeout_s) as counts, self._meter.measure() as cost:
            row = self._analyzer.measure(
                self._url,
                self._model,
                load.batch_size,
                load.tile_size,
                concurrency=load.concurrency,
                requests=max(1, load.concurrency, round(wanted)),
                memory=self._memory,
                timeout_s=self._timeout_s,
            )
        wall_s = time.perf_counter() - started
        return Sample(row.img_per_s * wall_s, wall_s, perf=row, cost=cost, cached=counts().cached)


@contextlib.contextmanager
def counted(url: str, model: str, timeout_s: float = 60.0) -> Iterator[Callable[[], ServerCounts]]:
    """Gives a function that tells what the server has counted since the block began; it stays usable after the block.

    Raises:
        ClientError: the server does not answer or refuses.
    """

    def read() -> ServerCounts:
        connection = Connection(url, model, "", timeout_s)
        try:
            return ServerCounts.read(connection)
        finally:
            connection.close()

    before = read()
    yield lambda: read().since(before)


def check_loads(loads: Sequence[Load], interface: Interface) -> None:
    """Refuse what the served model does not take, before anything is measured.

    Raises:
        ClientError: naming what it takes.
    """
    for load in loads:
        if load.tile_size not in interface.tile_sizes:
            sizes = ", ".join(str(size) for size in interface.tile_sizes)
            raise ClientError(f"the model takes tiles of {sizes}, not of {load.tile_size}")
        if not 1 <= load.batch_size <= interface.max_batch_size:
            raise ClientError(f"the model takes batches of 1 to {interface.max_batch_size}, not of {load.batch_size}")
