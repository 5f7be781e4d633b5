"""How a published model behaves on this machine: readiness, first answer, batching: ``python serve/trial.py``.

Serves artefacts from a folder of its own, once for each combination of queue delay, queue limit and instances, on free
ports. First as many clients as keep it busy find its capacity; then single tiles arrive at random at given rates. What
serves best within a latency budget is written down as the suggested way to publish.
"""

from __future__ import annotations

import contextlib
import itertools
import shlex
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve.measure import levels
from serve.measure.common import LEAST_REQUESTS, MeasureError
from serve.measure.meter import Meter
from serve.measure.open_loop import SecondOpinion, open_load, second_opinion
from serve.measure.perf_analyzer import PerfAnalyzer
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.connection import Connection
from serve.segment.slot import Slot
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet.config import setting
from unet.names import INPUT, OUTPUT
from unet.processes import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_LONE_REQUESTS = 15
_TIMEOUT_S = 300.0
# Shares of the capacity, used if no rates are given: a quiet server and a busy one.
_SHARES = (0.5, 0.8)
# The share of the highest rate that is enough: the rest costs more latency or memory than it is worth.
_ENOUGH = 0.95


@dataclass(frozen=True)
class TrialSettings:
    """What is tried, and how long."""

    artefacts: Path = setting(
        Path("artefacts"), "folder that export/main.py wrote; demo/artefacts where there is no artefacts"
    )
    max_queue_delay_us: tuple[int, ...] = setting((0,), "to try, one after the other", kind=int)
    max_queue_size: tuple[int, ...] = setting((0,), "to try; 0 is no queue policy", kind=int)
    instances: tuple[int, ...] = setting((0,), "to try; 0: by the machine", kind=int)
    threads: int = setting(0, "of each instance; 0 shares out the cores")
    clients: int = setting(8, "that ask at the same time to find the capacity")
    seconds: float = setting(5.0, "how long they ask")
    rates: tuple[float, ...] = setting(
        (), "arrivals a second to try; not given: half and four fifths of the first combination's capacity", kind=float
    )
    requests: int = setting(LEAST_REQUESTS[99], "that arrive at each rate; a 99th percentile needs 1,000")
    tile_size: int = setting(572, "rows and columns of a tile")
    p99_ms: float = setting(1000.0, "99 of 100 answers must come within")
    perf_analyzer: bool = setting(True, "measure each rate with NVIDIA's perf_analyzer too")
    out: Path = setting(Path("suggested_profile.json"), "file for what serves best")

    def __post_init__(self) -> None:
        if self.seconds <= 0 or min((*self.rates, 1)) <= 0 or min(self.clients, self.requests) < 1:
            raise MeasureError("--seconds, --rates, --clients and --requests must be positive")

    @property
    def combinations(self) -> list[ModelSettings]:
        """Every way of serving that is tried."""
        return [
            ModelSettings(threads=self.threads, max_queue_delay_us=delay, max_queue_size=size, instances=count)
            for delay, size, count in itertools.product(self.max_queue_delay_us, self.max_queue_size, self.instances)
        ]


@dataclass(frozen=True)
class Load:
    """The result of single tiles that arrived at random at one rate.

    Attributes:
        rate: arrivals a second.
        kept: whether the server kept up.
        outcome: answers a second, and what went wrong if anything did.
        p50_ms: median from the intended start to the answer; None where there was no answer.
        p99_ms: and its tail; None where there were too few requests for it.
        queue_ms: what a request waited before its pass, on average, by the server's own counts.
        batch: images in a pass, by the server's own counts.
        cpu_ms: time of all cores that the server's processes took for an image; other work on the machine hardly
            changes it. None where they cannot be seen.
        perf: what perf_analyzer measured at the same rate.
    """

    rate: float
    kept: bool
    outcome: str
    p50_ms: float | None
    p99_ms: float | None
    queue_ms: float
    batch: float
    cpu_ms: float | None
    perf: SecondOpinion


@dataclass(frozen=True)
class Trial:
    """The result of one way of serving.

    Attributes:
        settings: of the model.
        ready_s: from the command to readiness.
        first_ms: the first request after that.
        median_ms: of those that one client sends next.
        capacity: images a second with clients enough to keep it busy.
        loads: at each rate.
    """

    settings: ModelSettings
    ready_s: float
    first_ms: float
    median_ms: float
    capacity: float
    loads: tuple[Load, ...]


def try_out(settings: TrialSettings, model: ModelSettings, rates: Sequence[float]) -> Trial:
    """Serve artefacts once and measure.

    Args:
        settings: what is served, and how long it is measured.
        model: how it is served.
        rates: arrivals a second, one after the other; if empty, shares of the capacity that is found.

    Raises:
        UnetError: they cannot be published or served.
    """
    with tempfile.TemporaryDirectory(prefix="unet-trial-") as name:
        folder = Path(name)
        publish(settings.artefacts, folder / "models", model)
        http, grpc, metrics = free_ports(3)
        server = ServerSettings(folder / "models", folder / "log", folder / "state", http, grpc, metrics)
        started = time.perf_counter()
        with TritonServer(server):
            ready_s = time.perf_counter() - started
            with _connected(server.grpc_url, model.name) as connection:
                first_ms, *lone = _lone_requests(connection, settings.tile_size)
                meter = Meter(server.grpc_url)
                level = levels.TritonLevel(Slot, server.grpc_url, model.name, _TIMEOUT_S, meter)
                busy = level.measure(levels.Load(settings.tile_size, 1, settings.clients), settings.seconds)
                capacity = busy.img_per_s
                analyzer = PerfAnalyzer(folder) if settings.perf_analyzer else None
                loads = tuple(
                    _load(settings, connection, meter, analyzer, rate)
                    for rate in rates or [share * capacity for share in _SHARES]
                )
    return Trial(model, ready_s, first_ms, statistics.median(lone), capacity, loads)


@contextlib.contextmanager
def _connected(url: str, model: str) -> Iterator[Connection]:
    connection = Connection(url, model, "", _TIMEOUT_S)
    try:
        # The first call connects, which is not the model's time.
        connection.client.is_server_live()
        yield connection
    finally:
        connection.close()


def _lone_requests(connection: Connection, tile_size: int) -> list[float]:
    """Milliseconds of single requests, one after another."""
    tensor = connection.grpc.InferInput(INPUT, [1, 1, tile_size, tile_size], "UINT8")
    tensor.set_data_from_numpy(levels.Load(tile_size, 1).images())
    wanted = [connection.grpc.InferRequestedOutput(OUTPUT)]
    taken_ms = []
    for _ in range(1 + _LONE_REQUESTS):
        begun = time.perf_counter()
        connection.infer([tensor], wanted)
        taken_ms.append((time.perf_counter() - begun) * 1e3)
    return taken_ms


def _load(
    settings: TrialSettings, connection: Connection, meter: Meter, analyzer: PerfAnalyzer | None, rate: float
) -> Load:
    where = connection.url, connection.model_name
    with levels.counted(*where) as counts, meter.measure() as cost:
        found = open_load(connection, settings.tile_size, rate, settings.requests)
    seen = counts()
    perf = SecondOpinion(note="left out")
    if analyzer is not None:
        perf = second_opinion(analyzer, connection, settings.tile_size, rate, settings.requests)
    cpu_s, images = cost.server_cpu_s, max(1, seen.images)
    return Load(
        rate,
        found.kept,
        found.outcome,
        found.percentile_ms(50),
        found.percentile_ms(99),
        seen.queue_ns / max(1, seen.requests) / 1e6,
        seen.images / max(1, seen.passes),
        None if cpu_s is None else cpu_s / images * 1e3,
        perf,
    )


def row(trial: Trial, load: Load) -> list[str]:
    """The cells of one line of the table, in the order of `HEADINGS`."""
    settings = trial.settings
    return [
        *(f"{settings.queue_delay_us / 1e3:g}", "yes" if settings.queue_policy else "no", str(settings.instance_count)),
        *(f"{trial.ready_s:.1f}", f"{trial.first_ms:.0f}", f"{trial.median_ms:.0f}", f"{trial.capacity:.1f}"),
        *(f"{load.rate:.1f}", load.outcome),
        *(
            _ms(load.p50_ms),
            _ms(load.p99_ms),
            str(load.perf),
            f"{load.queue_ms:.1f}",
            f"{load.batch:.2f}",
            _ms(load.cpu_ms),
        ),
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


HEADINGS = (
    *("delay ms", "queue policy", "instances", "ready s", "first ms", "median ms", "capacity, img/s"),
    *("arrivals/s", "answers/s", "p50 ms", "p99 ms", "perf_analyzer p99 ms", "queue ms", "images in a pass"),
    "CPU ms/img",
)


def suggest(trials: Sequence[Trial], p99_ms: float) -> tuple[Trial, Load]:
    """The shortest queue delay and the fewest instances that bear 95 % of the highest rate within a budget.

    Args:
        trials: what was tried.
        p99_ms: 99 of 100 answers must come within so many milliseconds.

    Returns:
        The trial and the load under which it did.

    Raises:
        MeasureError: nothing that was tried stays within the budget.
    """
    loads = [(trial, load, load.p99_ms) for trial in trials for load in trial.loads]
    known = [(trial, load, tail) for trial, load, tail in loads if tail is not None and load.kept]
    within = [(trial, load, tail) for trial, load, tail in known if tail <= p99_ms]
    if all(tail is None for *_, tail in loads):
        raise MeasureError(f"a 99th percentile needs {LEAST_REQUESTS[99]:,} requests at each rate: raise --requests")
    if not within:
        best = f", the best within {min(tail for *_, tail in known):.0f} ms" if known else ": no rate was kept"
        raise MeasureError(
            f"nothing that was tried answers 99 of 100 requests within {p99_ms:g} ms{best}: raise --p99_ms, or try "
            "lower --rates"
        )
    highest = max(load.rate for _, load, _ in within)
    enough = [one for one in within if one[1].rate >= _ENOUGH * highest]
    least = min(enough, key=lambda one: (one[0].settings.queue_delay_us, one[0].settings.instance_count, one[2]))
    trial, load, _ = least
    return trial, load


def suggestion(trial: Trial, load: Load, p99_ms: float, artefacts: Path) -> dict[str, Any]:
    """A suggested profile: the settings that differ from the defaults, the command, and what was measured."""
    settings = {
        name: value for name, value in asdict(trial.settings).items() if value != getattr(ModelSettings(), name)
    }
    words = ["python", "serve/repository.py", "--artefacts", str(artefacts)]
    words += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    measured = {**asdict(load), "capacity_img_per_s": trial.capacity}
    return {"settings": settings, "command": shlex.join(words), "p99_budget_ms": p99_ms, "measured": measured}
