"""How a published model behaves on this machine: readiness, first answer, batching: ``python serve/trial.py``.

Serves artefacts from a folder of its own, once for each combination of queue delay, queue limit and instances, on free
ports, and asks one tile at a time from one client and from several. What serves best within a latency budget is written
down as the suggested way to publish.
"""

from __future__ import annotations

import contextlib
import shlex
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.measure import levels
from serve.measure.meter import Meter
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.slots import Slot
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet.errors import UnetError
from unet.names import INPUT
from unet.processes import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LONE_REQUESTS = 15
_TIMEOUT_S = 300.0
# Of the peak throughput: what is beyond costs more latency or memory than it is worth.
_ENOUGH = 0.95


class TrialError(UnetError):
    """A trial that cannot be made as asked."""


@dataclass(frozen=True)
class Load:
    """What several clients came to, each with one tile under way at a time.

    Attributes:
        clients: how many.
        img_per_s: images over wall time.
        p50_ms: median of a request.
        p99_ms: and its tail.
        queue_ms: what a request waited before its pass, on average, by the server's own counts.
        batch: images in a pass, by the server's own counts.
        cpu_ms: time of all cores that the server's processes took for an image; other work on the machine hardly
            changes it.
    """

    clients: int
    img_per_s: float
    p50_ms: float
    p99_ms: float
    queue_ms: float
    batch: float
    cpu_ms: float


@dataclass(frozen=True)
class Trial:
    """What one way of serving came to.

    Attributes:
        settings: of the model.
        ready_s: from the command to readiness.
        first_ms: the first request after that.
        median_ms: of those that one client sends next.
        loads: under more clients.
    """

    settings: ModelSettings
    ready_s: float
    first_ms: float
    median_ms: float
    loads: tuple[Load, ...]


def try_out(
    artefacts: Path, settings: ModelSettings, clients: Sequence[int], *, tile_size: int, seconds: float
) -> Trial:
    """Serve artefacts once and measure.

    Args:
        artefacts: folder that the exporter wrote.
        settings: how they are served.
        clients: numbers of clients to try, one after the other.
        tile_size: rows and columns of a tile.
        seconds: for each number of clients.

    Raises:
        UnetError: they cannot be published or served.
    """
    with tempfile.TemporaryDirectory(prefix="unet-trial-") as name:
        folder = Path(name)
        publish(artefacts, folder / "models", settings)
        http, grpc, metrics = free_ports(3)
        server = ServerSettings(folder / "models", folder / "log", folder / "state", http, grpc, metrics)
        started = time.perf_counter()
        with TritonServer(server):
            ready_s = time.perf_counter() - started
            with _asker(server.grpc_url, settings.name, tile_size) as ask:
                first_ms, *lone = (ask() for _ in range(1 + _LONE_REQUESTS))
            loads = tuple(_load(server.grpc_url, settings.name, count, tile_size, seconds) for count in clients)
    return Trial(settings, ready_s, first_ms, statistics.median(lone), loads)


@contextlib.contextmanager
def _asker(url: str, model: str, tile_size: int) -> Iterator[Any]:
    """A function that has one tile segmented and gives the milliseconds."""
    from tritonclient import grpc

    image = np.random.default_rng(0).integers(0, 256, (1, 1, tile_size, tile_size), np.uint8)
    tensor = grpc.InferInput(INPUT, list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    with grpc.InferenceServerClient(url) as client:
        # The connection is not the model's.
        client.is_server_live()

        def ask() -> float:
            begun = time.perf_counter()
            client.infer(model, [tensor], client_timeout=_TIMEOUT_S)
            return (time.perf_counter() - begun) * 1e3

        yield ask


def _load(url: str, model: str, clients: int, tile_size: int, seconds: float) -> Load:
    level = levels.TritonLevel(Slot, url, model, _TIMEOUT_S, Meter(url))
    sample = level.measure(levels.Load(tile_size, 1, clients), seconds)
    counts, cost = sample.server, sample.cost
    if counts is None or cost is None or cost.server_cpu_s is None:
        raise TrialError(f"the server at {url} cannot be seen among this machine's processes: run this as its user")
    p50_ms, p99_ms = (float(value) * 1e3 for value in np.percentile(sample.latencies_s, (50, 99)))
    queue_ms, batch = counts.queue_ns / counts.requests / 1e6, counts.images / counts.passes
    cpu_ms = cost.server_cpu_s / counts.images * 1e3
    return Load(clients, sample.img_per_s, p50_ms, p99_ms, queue_ms, batch, cpu_ms)


def row(trial: Trial, load: Load) -> str:
    """One line of the table."""
    settings = trial.settings
    policy = "yes" if settings.queue_policy else "no"
    cells = (
        *(f"{settings.queue_delay_us / 1e3:g}", policy, str(settings.instance_count), f"{trial.ready_s:.1f}"),
        *(f"{trial.first_ms:.0f}", f"{trial.median_ms:.0f}", str(load.clients), f"{load.img_per_s:.1f}"),
        *(f"{load.p50_ms:.0f}", f"{load.p99_ms:.0f}", f"{load.queue_ms:.1f}", f"{load.batch:.2f}"),
        f"{load.cpu_ms:.0f}",
    )
    return f"| {' | '.join(cells)} |"


def suggest(trials: Sequence[Trial], p99_ms: float) -> tuple[Trial, Load]:
    """The shortest queue delay and the fewest instances that reach 95 % of the peak throughput within a budget.

    Args:
        trials: what was tried.
        p99_ms: 99 of 100 answers must come within so many milliseconds.

    Returns:
        The trial and the load under which it did.

    Raises:
        TrialError: nothing that was tried stays within the budget.
    """
    within = [(trial, load) for trial in trials for load in trial.loads if load.p99_ms <= p99_ms]
    if not within:
        least = min(load.p99_ms for trial in trials for load in trial.loads)
        raise TrialError(
            f"nothing that was tried answers 99 of 100 requests within {p99_ms:g} ms, the best within {least:.0f} ms: "
            "raise --p99_ms, or try fewer --clients"
        )
    peak = max(load.img_per_s for _, load in within)
    enough = [(trial, load) for trial, load in within if load.img_per_s >= _ENOUGH * peak]
    return min(enough, key=lambda one: (one[0].settings.queue_delay_us, one[0].settings.instance_count, one[1].p99_ms))


def suggestion(trial: Trial, load: Load, p99_ms: float, artefacts: Path) -> dict[str, Any]:
    """A suggested profile: the settings that differ from the defaults, the command, and what was measured."""
    settings = {
        name: value for name, value in asdict(trial.settings).items() if value != getattr(ModelSettings(), name)
    }
    words = ["python", "serve/repository.py", "--artefacts", str(artefacts)]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return {"settings": settings, "command": shlex.join(words), "p99_budget_ms": p99_ms, "measured": asdict(load)}


HEADINGS = (
    *("delay ms", "queue policy", "instances", "ready s", "first ms", "median ms"),
    *("clients", "img/s", "p50 ms", "p99 ms", "queue ms", "images in a pass", "CPU ms/img"),
)
