"""The same tiles by every way, in one interleaved run: ``python serve/benchmark.py`` (``make benchmark``).

The engine alone in this process, Triton by gRPC and by shared memory, NVIDIA's perf_analyzer, and the client from file
to file. Every level is measured once in each round, another one first each time, so that a slow moment of the machine
meets all; ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import platform
import statistics
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
from tqdm import tqdm

from serve.measure import tables
from serve.measure.levels import EngineLevel, Infer, Level, Load, PerfAnalyzerLevel, TritonLevel, check_loads
from serve.measure.meter import Meter
from serve.measure.perf_analyzer import PerfAnalyzer, PerfAnalyzerError
from serve.measure.rows import SLICE_PX, Row, summarise
from serve.segment.connection import Connection
from serve.segment.segmenter import Segmenter
from serve.segment.slots import Slot, slot_for
from serve.volume.run import Request, segment_volume
from unet.card import CARD_FILE, Card
from unet.engine.cpu import load_engine
from unet.errors import UnetError
from unet.files import atomic_file, sha256_of, write_json
from unet.geometry import predict_tiled
from unet.machine import run_tool, usable_cores
from unet.measure import interleave, ratios, timed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

ENGINE = EngineLevel.name


class BenchmarkError(UnetError):
    """Something that cannot be measured."""


@contextlib.contextmanager
def served_engine(artefacts: Path, connection: Connection) -> Iterator[Infer]:
    """The engine that a server runs, in this process: for a CPU profile the card's, else the plan on the GPU.

    Args:
        artefacts: folder that the exporter wrote; the served version must be made of it.
        connection: to the served model.

    Raises:
        BenchmarkError: there are no such artefacts, or the server serves others.
        UnetError: the engine cannot be loaded here.
    """
    path = artefacts / CARD_FILE
    if not path.is_file():
        raise BenchmarkError(f"{path} does not exist: name the served artefacts with --artefacts")
    parameters = connection.client.get_model_config(connection.model_name).config.parameters
    if parameters["card_sha256"].string_value != sha256_of(path):
        raise BenchmarkError(f"{connection.url} does not serve {artefacts}: publish it, or name what it serves")
    if parameters["profile"].string_value != "cpu":
        from unet.engine.plan import PlanRunner

        with PlanRunner(artefacts) as runner:
            yield runner.infer
        return
    yield load_engine(Card.load(artefacts), usable_cores()).infer


class Bench:
    """One run.

    Attributes:
        not_measured: why a level has no figures, by its name.
        rows: of every level under every load.
        stack: a stack from file to file over the same arithmetic by the engine; empty if it was not measured.
    """

    def __init__(self, chosen: Any) -> None:
        self.chosen = chosen
        self.not_measured: dict[str, str] = {}
        self.rows: list[Row] = []
        self.stack: dict[str, Any] = {}

    def run(self) -> None:
        """Measure everything.

        Raises:
            ClientError: the server does not answer or refuses, or does not take such tiles or batches.
        """
        chosen = self.chosen
        loads = [
            Load(tile, batch, many)
            for tile in dict.fromkeys(chosen.tile_sizes)
            for batch in dict.fromkeys(chosen.batch_sizes)
            for many in dict.fromkeys(chosen.concurrency)
        ]
        with contextlib.ExitStack() as stack:
            connection = Connection(chosen.url, chosen.model_name, "", chosen.timeout_s)
            stack.callback(connection.close)
            check_loads(loads, connection.interface(chosen.timeout_s))
            try:
                infer = stack.enter_context(served_engine(chosen.artefacts, connection))
            except UnetError as error:
                infer = None
                self.not_measured[ENGINE] = str(error)
            levels = self._levels(infer)
            steps = len(loads) * len(levels) * chosen.rounds
            bar = stack.enter_context(tqdm(total=steps, unit="run", disable=None))
            for load in loads:
                self._measure(levels, load, bar)
            if infer is not None and chosen.slices:
                bar.set_postfix_str("client")
                self.stack = self._from_file_to_file(infer)

    def _levels(self, infer: Infer | None) -> list[Level]:
        chosen = self.chosen
        where = chosen.url, chosen.model_name, chosen.timeout_s
        meter = Meter(chosen.url)
        levels: list[Level] = [] if infer is None else [EngineLevel(infer, meter)]
        levels.append(TritonLevel(Slot, *where, meter))
        kind = slot_for(chosen.url, chosen.shared_memory)
        # What came down to sending would be the former level once more.
        if kind is not Slot:
            levels.append(TritonLevel(kind, *where, meter))
        if not chosen.no_perf_analyzer:
            try:
                analyzer = PerfAnalyzer(chosen.out)
            except PerfAnalyzerError as error:
                self.not_measured[PerfAnalyzerLevel.name] = str(error)
            else:
                timeout_s = 2 * chosen.timeout_s
                levels.append(PerfAnalyzerLevel(analyzer, kind, *where[:2], timeout_s, meter))
        return levels

    def _measure(self, levels: Sequence[Level], load: Load, bar: Any) -> None:
        seconds = self.chosen.seconds / self.chosen.rounds
        failures: dict[str, str] = {}

        def measure(level: Level) -> Any:
            bar.set_postfix_str(f"{level.name}, tile {load.tile_size}, batch {load.batch_size}")
            bar.update()
            if level.name in failures:
                return None
            try:
                return level.measure(load, seconds)
            except PerfAnalyzerError as error:  # a second opinion, without which the others still count
                failures[level.name] = str(error)
                return None

        found = interleave({level.name: partial(measure, level) for level in levels}, self.chosen.rounds)
        for name, reason in failures.items():
            self.not_measured[f"{name}, tile {load.tile_size}, batch {load.batch_size}"] = reason
        self.rows += [summarise(name, load, samples) for name, samples in found.items() if name not in failures]

    def _from_file_to_file(self, infer: Infer) -> dict[str, Any]:
        """A stack by the client, from file to file, over the same tiles by the engine on arrays in memory."""
        chosen = self.chosen
        images = np.random.default_rng(0).integers(0, 256, (chosen.slices, SLICE_PX, SLICE_PX), np.uint8)
        with (
            tempfile.TemporaryDirectory() as name,
            Segmenter(
                chosen.url, chosen.model_name, timeout_s=chosen.timeout_s, shared_memory=chosen.shared_memory
            ) as segmenter,
        ):
            source = Path(name) / "stack.tif"
            tifffile.imwrite(source, images, photometric="minisblack")
            plan = segmenter.plan(SLICE_PX, SLICE_PX)

            def client() -> None:
                segment_volume(segmenter, source, Request(overwrite=True, quiet=True))

            def predict(tiles: npt.NDArray[Any]) -> npt.NDArray[Any]:
                return infer(tiles[:, np.newaxis])[:, 0]

            def engine() -> None:
                for image in images:
                    predict_tiled(image, plan, predict)

            subjects = {"client": timed(client), ENGINE: timed(engine)}
            interleave(subjects, 1)
            taken = interleave(subjects, chosen.rounds)
        return {
            "slices": chosen.slices,
            "tile_size": plan.tile_size,
            "tiles_per_slice": len(plan),
            **{f"{who}_slices_per_s": chosen.slices / statistics.median(each) for who, each in taken.items()},
            "client_over_engine": ratios(taken[ENGINE], taken["client"]),
        }

    def report(self) -> str:
        """Everything that was found, as Markdown."""
        rows, loads = self.rows, tables.loads_of(self.rows)
        parts = [
            f"Images through {self.chosen.model_name} on {machine()}, "
            f"{self.chosen.rounds} rounds, {self.chosen.seconds:g} s for each cell.",
            "The V100 columns are another machine's: the reference document measured TensorFlow there, with no server.",
            tables.throughput_table(rows),
        ]
        if self.stack:
            each = self.stack["client_over_engine"]
            parts.append(
                f"A stack of {self.stack['slices']} slices of {SLICE_PX} x {SLICE_PX} from file to file by the client: "
                f"{self.stack['client_slices_per_s']:.2f} slices/s, by the engine on arrays in memory "
                f"{self.stack['engine_slices_per_s']:.2f}; ratio {statistics.median(each):.3f} "
                f"({each[0]:.3f}-{each[-1]:.3f}), {self.stack['tiles_per_slice']} tile of {self.stack['tile_size']} "
                "for a slice."
            )
        if ENGINE in tables.levels_of(rows):
            parts += ["Over the engine alone, round by round:", tables.ratio_table(rows, ENGINE)]
        parts += ["Where the time goes:", tables.latency_table(rows)]
        if any(load[0] == tables.V100_TILE for load in loads):
            parts += ["On a V100:", tables.v100_table(rows, gpu_name())]
        parts += tables.refusals(rows)
        parts += [f"{tables.NOT_MEASURED}: {name}: {reason}" for name, reason in self.not_measured.items()]
        return "\n\n".join(parts)

    def write(self, text: str) -> None:
        """Write Markdown, CSV, JSON and charts."""
        out = self.chosen.out
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self.chosen).items()}
        values = {
            "settings": settings,
            "machine": machine(),
            "rows": [{**asdict(row), "slices_per_s": row.slices_per_s} for row in self.rows],
            "stack": self.stack,
            "not_measured": self.not_measured,
            "reference_v100_another_machine": {
                str(size): {"tf_amp_img_per_s": half, "fp32_img_per_s": single}
                for size, (half, single) in tables.V100_IMG_PER_S.items()
            },
        }
        write_json(out / "benchmark.json", values)
        with atomic_file(out / "benchmark.md") as aside:
            aside.write_text(text + "\n", encoding="utf-8")
        tables.write_csv(out / "benchmark.csv", self.rows)
        tables.draw(out, self.rows)


def gpu_name() -> str:
    """The first GPU of this machine, empty if there is none."""
    said = run_tool("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return said.splitlines()[0].strip() if said and said.strip() else ""


def machine() -> str:
    """What this ran on, in words."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return ", ".join(filter(None, (f"{usable_cores()} cores of {cpu}", gpu_name())))
