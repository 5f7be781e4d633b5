"""The same tiles by every way, in one interleaved run: ``python serve/benchmark.py`` (``make benchmark``).

The engine alone in this process, Triton by gRPC and by shared memory, NVIDIA's perf_analyzer, and the client from file
to file. Every level is measured once in each round, and each round starts with another level, so that a slow moment of
the machine affects all of them; ratios are taken within a round.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from serve.measure import tables
from serve.measure.common import MeasureError, plain
from serve.measure.levels import EngineLevel, Infer, Level, Load, PerfAnalyzerLevel, TritonLevel, check_loads
from serve.measure.meter import Meter
from serve.measure.perf_analyzer import PerfAnalyzer
from serve.measure.progress import Progress
from serve.measure.rows import SLICE_PX, Row, summarise
from serve.measure.served import gpu_name, instance_threads, machine_in_words, served_engine
from serve.segment.connection import Connection
from serve.segment.segmenter import Segmenter
from serve.segment.slot import Slot
from serve.segment.slots import slot_for
from serve.volume.request import Request
from serve.volume.run import segment_volume
from unet.config import setting
from unet.errors import UnetError
from unet.files import atomic_file, write_json
from unet.geometry import predict_tiled
from unet.measure import interleave, ratios, timed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

ENGINE, PERF_ANALYZER, CLIENT = EngineLevel.name, PerfAnalyzerLevel.name, "client"


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, where and how long."""

    url: str = setting("localhost:8001", "HOST:PORT of the server's gRPC")
    model_name: str = setting("unet", "the served model")
    artefacts: Path = setting(
        Path("artefacts"), "what is served, for the engine alone; demo/artefacts where there is no artefacts"
    )
    tile_sizes: tuple[int, ...] = setting((572,), "rows and columns of an image", kind=int)
    batch_sizes: tuple[int, ...] = setting((1, 8, 16), "images in a request", kind=int)
    concurrency: tuple[int, ...] = setting((1,), "requests at a time", kind=int)
    rounds: int = setting(3, "turns that the levels take")
    seconds: float = setting(6.0, "for each level under each load, all rounds together")
    slices: int = setting(15, "of 512 x 512, in the stack that goes from file to file; 0 for none")
    timeout_s: float = setting(300.0, "longest wait for an answer")
    shared_memory: str = setting("auto", "with a server on this machine", choices=("auto", "on", "off", "cuda"))
    perf_analyzer: bool = setting(True, "measure with NVIDIA's perf_analyzer too")
    out: Path = setting(Path("benchmark"), "folder for tables and charts")

    def __post_init__(self) -> None:
        if self.seconds <= 0 or min(self.rounds, *self.concurrency) < 1 or self.slices < 0:
            raise MeasureError("--seconds must be positive, --rounds and --concurrency at least 1, --slices 0 or more")

    @property
    def loads(self) -> list[Load]:
        """Every load once, in the order in which they are measured."""
        return [
            Load(tile, batch, many)
            for tile in dict.fromkeys(self.tile_sizes)
            for batch in dict.fromkeys(self.batch_sizes)
            for many in dict.fromkeys(self.concurrency)
        ]


class Bench:
    """One run, whose results are written as they come.

    Attributes:
        not_measured: why something has no figures, by its name.
        lost: of these, what should have been measured and failed.
        rows: of every level under every load.
        stack: a stack from file to file over the same arithmetic by the engine; empty if it was not measured.
        threads: that the engine alone computed with; 0 if it was not measured, or computes on a GPU.
    """

    def __init__(self, settings: BenchmarkSettings) -> None:
        self.settings = settings
        self.not_measured: dict[str, str] = {}
        self.lost: list[str] = []
        self.rows: list[Row] = []
        self.stack: dict[str, Any] = {}
        self.threads = 0

    def run(self) -> None:
        """Measure everything. What fails is noted, and the rest is still measured.

        Raises:
            ClientError: at the start the server does not answer or refuses, or does not take such tiles or batches.
        """
        settings = self.settings
        settings.out.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            connection = Connection(settings.url, settings.model_name, "", settings.timeout_s)
            stack.callback(connection.close)
            check_loads(settings.loads, connection.interface(settings.timeout_s))
            infer: Infer | None = None
            try:
                infer = stack.enter_context(served_engine(settings.artefacts, connection))
                self.threads = instance_threads(connection)
            except UnetError as error:
                self.not_measured[ENGINE] = str(error)
            levels = self._levels(infer)
            steps = len(settings.loads) * len(levels) * settings.rounds
            progress = stack.enter_context(Progress(steps + bool(infer is not None and settings.slices)))
            for load in settings.loads:
                self._measure(levels, load, progress)
                self.write()
            if infer is not None and settings.slices:
                with progress.step("a stack from file to file"):
                    found = self._attempt(CLIENT, partial(self._from_file_to_file, infer))
                self.stack = found or {}
                self.write()
        tables.draw(settings.out, self.rows)

    def check(self) -> None:
        """Check that everything was measured.

        Raises:
            MeasureError: something failed; what was measured is kept.
        """
        if self.lost:
            raise MeasureError(
                f"{len(self.lost)} of the measurements failed, the others are in {self.settings.out}; the first is "
                f"{self.lost[0]}: {self.not_measured[self.lost[0]]}"
            )

    def _levels(self, infer: Infer | None) -> list[Level]:
        settings = self.settings
        where = settings.url, settings.model_name, settings.timeout_s
        meter = Meter(settings.url)
        levels: list[Level] = [] if infer is None else [EngineLevel(infer, meter)]
        levels.append(TritonLevel(Slot, *where, meter))
        kind = slot_for(settings.url, settings.shared_memory)
        # Without shared memory this would be the same level as the one before.
        if kind is not Slot:
            levels.append(TritonLevel(kind, *where, meter))
        if settings.perf_analyzer:
            try:
                analyzer = PerfAnalyzer(settings.out)
            except MeasureError as error:
                self.not_measured[PERF_ANALYZER] = str(error)
            else:
                levels.append(PerfAnalyzerLevel(analyzer, kind, *where[:2], 2 * settings.timeout_s, meter))
        return levels

    def _measure(self, levels: Sequence[Level], load: Load, progress: Progress) -> None:
        """Every level under one load, round by round; one that fails is not tried again under this load."""
        seconds = self.settings.seconds / self.settings.rounds
        names = {level.name: f"{level.name}, tile {load.tile_size}, batch {load.batch_size}" for level in levels}
        if load.concurrency > 1:
            names = {level: f"{name}, {load.concurrency} at a time" for level, name in names.items()}

        def measure(level: Level) -> Any:
            with progress.step(names[level.name]):
                if names[level.name] in self.not_measured:
                    return None
                return self._attempt(names[level.name], lambda: level.measure(load, seconds))

        found = interleave({level.name: partial(measure, level) for level in levels}, self.settings.rounds)
        for name, samples in found.items():
            if names[name] not in self.not_measured:
                row = self._attempt(names[name], partial(summarise, name, load, samples))
                self.rows += [] if row is None else [row]

    def _attempt(self, name: str, run: Callable[[], Any]) -> Any:
        """The result, or None if it fails: the reason is noted, and earlier results stay."""
        try:
            return run()
        except Exception as error:  # whatever it is, it must not cost the other rows
            said = str(error) if isinstance(error, UnetError) else f"{type(error).__name__}: {error}"
            self.not_measured[name] = said
            # perf_analyzer is only a second opinion.
            if not name.startswith(PERF_ANALYZER):
                self.lost.append(name)
            return None

    def _from_file_to_file(self, infer: Infer) -> dict[str, Any]:
        """A stack by the client, from file to file, over the same tiles by the engine on arrays in memory."""
        settings = self.settings
        random = np.random.default_rng()
        images = np.empty((settings.slices, SLICE_PX, SLICE_PX), np.uint8)
        with (
            tempfile.TemporaryDirectory() as name,
            Segmenter(
                settings.url, settings.model_name, timeout_s=settings.timeout_s, shared_memory=settings.shared_memory
            ) as segmenter,
        ):
            source = Path(name) / "stack.tif"
            plan = segmenter.plan(SLICE_PX, SLICE_PX)
            client = timed(lambda: segment_volume(segmenter, source, Request(overwrite=True, quiet=True)))

            def new_stack_by_client() -> float:
                # Other slices each time, so that a response cache never has the answers; not timed.
                images[...] = random.integers(0, 256, images.shape, np.uint8)
                tifffile.imwrite(source, images, photometric="minisblack")
                return client()

            def predict(tiles: npt.NDArray[Any]) -> npt.NDArray[Any]:
                return infer(tiles[:, np.newaxis])[:, 0]

            def engine() -> None:
                for image in images:
                    predict_tiled(image, plan, predict)

            subjects = {CLIENT: new_stack_by_client, ENGINE: timed(engine)}
            interleave(subjects, 1)
            taken = interleave(subjects, settings.rounds)
        return {
            "slices": settings.slices,
            "tile_size": plan.tile_size,
            "tiles_per_slice": len(plan),
            **{f"{who}_slices_per_s": settings.slices / statistics.median(each) for who, each in taken.items()},
            "client_over_engine": ratios(taken[ENGINE], taken[CLIENT]),
        }

    def report(self) -> str:
        """Everything that was found, as Markdown."""
        return tables.report(self.rows, self.stack, self.not_measured, self._heading(), gpu_name())

    def _heading(self) -> str:
        settings = self.settings
        engine = f" The engine alone computes with {self.threads} threads, as an instance of the server does."
        return (
            f"Images through {settings.model_name} on {machine_in_words()}, {settings.rounds} rounds, "
            f"{settings.seconds:g} s for each cell.{engine if self.threads else ''}"
        )

    def write(self) -> None:
        """Write Markdown, CSV and JSON of what there is by now."""
        out = self.settings.out
        values = {
            "settings": plain(asdict(self.settings)),
            "machine": machine_in_words(),
            "engine_threads": self.threads,
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
            aside.write_text(self.report() + "\n", encoding="utf-8")
        tables.write_csv(out / "benchmark.csv", self.rows)
