"""What a period of load costs, by the counters of the server, of the operating system and of the GPU's driver."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import psutil

from serve.segment.slots import on_this_machine
from unet.machine import run_tool

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve.segment.connection import Connection

_LOOPBACK = "lo"
_COUNTED_WITHIN_S = 2.0
_GPU_QUERY = ("nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits")


@dataclass(frozen=True)
class ServerCounts:
    """What Triton has counted of a model since it was loaded; times are sums over requests, in nanoseconds.

    Attributes:
        images: inferences, one for each image.
        passes: of the engine.
        requests: that the engine answered.
        cached: requests that the response cache answered, without a pass.
    """

    images: int
    passes: int
    requests: int
    queue_ns: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int
    cached: int = 0

    @classmethod
    def read(cls, connection: Connection) -> ServerCounts:
        """Ask a server about a connection's model.

        Raises:
            ServerError: the server does not answer or refuses.
        """
        try:
            # One entry for each version that is loaded: a new one may be published meanwhile.
            versions = connection.client.get_inference_statistics(connection.model_name).model_stats
        except connection.grpc.InferenceServerException as error:
            raise connection.explain(error) from error
        return cls(*(sum(column) for column in zip(*map(_counts_of, versions))))

    @classmethod
    def read_after(cls, connection: Connection, before: ServerCounts, answers: int) -> ServerCounts:
        """Ask a server that has given so many answers since an earlier count.

        It counts a request after it has sent the answer, so the last ones may be missing for a moment.

        Raises:
            ServerError: the server does not answer or refuses.
        """
        deadline = time.monotonic() + _COUNTED_WITHIN_S
        while True:
            counts = cls.read(connection)
            new = counts.since(before)
            # A version that is unloaded takes its counts along, so that they never arrive.
            if new.requests + new.cached >= answers or time.monotonic() > deadline:
                return counts

    def since(self, before: ServerCounts) -> ServerCounts:
        """What came after an earlier count."""
        # The counts of a version go when it is unloaded.
        return ServerCounts(*(max(0, getattr(self, one.name) - getattr(before, one.name)) for one in fields(self)))


def _counts_of(version: Any) -> tuple[int, ...]:
    stats = version.inference_stats
    cached = stats.cache_hit.count
    times = (stats.queue.ns, stats.compute_input.ns, stats.compute_infer.ns, stats.compute_output.ns)
    # Triton queues a request before it asks the cache.
    return (version.inference_count, version.execution_count, stats.compute_infer.count, *times, cached)


def cpu_s(process: psutil.Process) -> float:
    """Seconds of CPU time that a process and its children have taken so far; 0 for one that is gone."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                times = each.cpu_times()
                total += times.user + times.system
    return total


def rss_mib(process: psutil.Process) -> float:
    """Resident memory of a process and its children, in MiB; what they share is counted for each."""
    total = 0
    with contextlib.suppress(psutil.Error):
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += each.memory_info().rss
    return total / 2**20


def server_process(url: str) -> psutil.Process | None:
    """The process on this machine that listens at an address, None if it cannot be seen."""
    if not on_this_machine(url):
        return None
    port = int(url.rsplit(":", 1)[1])
    with contextlib.suppress(psutil.Error):
        for socket in psutil.net_connections("tcp"):
            if socket.status == psutil.CONN_LISTEN and socket.pid and tuple(socket.laddr)[1:2] == (port,):
                return psutil.Process(socket.pid)
    return None


@dataclass
class Cost:
    """What a period of load took.

    Attributes:
        client_cpu_s: of this process and its children, in seconds of one core.
        server_cpu_s: of the server and its backends; None where they cannot be seen.
        other_cpu_s: of all other visible processes of this machine; it should be close to 0.
        server_rss_mib: resident memory of the server and its backends at the end; None where they cannot be seen.
        wire_bytes: that went over the network, or over the loopback interface, whoever sent them.
        gpu_percent: utilisation of the GPU at the end, None without one.
        gpu_mib: its memory in use.
    """

    client_cpu_s: float = 0.0
    server_cpu_s: float | None = None
    other_cpu_s: float = 0.0
    server_rss_mib: float | None = None
    wire_bytes: int = 0
    gpu_percent: float | None = None
    gpu_mib: float | None = None


class Meter:
    """Measures the cost of what happens in its blocks.

    Args:
        url: the server's address.
    """

    def __init__(self, url: str) -> None:
        self._local = on_this_machine(url)
        self._server = server_process(url)
        self._me = psutil.Process()

    @contextlib.contextmanager
    def measure(self) -> Iterator[Cost]:
        """Yields a cost whose values are filled in at the end of the block."""
        cost = Cost()
        before, sent = self._times(), self._wire_bytes()
        yield cost
        client, server, everyone = (now - then for now, then in zip(self._times(), before))
        cost.wire_bytes = self._wire_bytes() - sent
        cost.client_cpu_s, cost.other_cpu_s = client, max(0.0, everyone - client - server)
        if self._server is not None:
            cost.server_cpu_s, cost.server_rss_mib = server, rss_mib(self._server)
        said = run_tool(*_GPU_QUERY)
        if said:
            # A driver answers "[N/A]" for what it does not count, as on a GPU that is split into instances.
            with contextlib.suppress(ValueError):
                cost.gpu_percent, cost.gpu_mib = (float(cell) for cell in said.splitlines()[0].split(","))

    def _times(self) -> tuple[float, float, float]:
        """CPU time of this process's tree, of the server's, and of every process that can be seen."""
        everyone = 0.0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                # A parent takes over the time of the children that have ended.
                everyone += sum(times[:4])
        mine = 0.0
        with contextlib.suppress(psutil.Error):
            times = self._me.cpu_times()
            mine = times.children_user + times.children_system
        return cpu_s(self._me) + mine, cpu_s(self._server) if self._server else 0.0, everyone

    def _wire_bytes(self) -> int:
        """Bytes sent over the loopback interface, where each is received too, or both ways over all the others."""
        counters = psutil.net_io_counters(pernic=True)
        if self._local:
            return int(counters[_LOOPBACK].bytes_sent) if _LOOPBACK in counters else 0
        return sum(one.bytes_sent + one.bytes_recv for name, one in counters.items() if name != _LOOPBACK)
