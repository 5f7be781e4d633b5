"""The same network by other means, in one interleaved run: ``python serve/peers.py`` (``make peers``).

Each subject has the same weights and the same tiles, is measured in a process of its own in every round, one after
another, and its answer is compared with TensorFlow's. The machine's own limit is measured in the same rounds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.measure.common import MeasureError
from serve.measure.peers.process import call_worker, prepare, tiles_of
from serve.measure.peers.settings import PeersSettings, held_to
from serve.measure.peers.worker import GEMM, NEEDS
from serve.measure.progress import Progress
from unet.measure import interleave, ratios

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

OURS, REFERENCE = "engine", "tensorflow"
# A subject that computes something else is not compared. bf16 keeps 8 bits of each product's operands.
LARGEST_MEAN_DIFFERENCE = 0.02
# ONNX Runtime's own kernels look at the processor alone.
NOT_HELD = {"onnxruntime": "no setting holds it to fewer instructions than the processor has"}


@dataclass
class Subject:
    """The results of one subject.

    Attributes:
        img_per_s: by batch size, one value for each round.
        precision: "f32", "bf16" or "int8", of our own engine; empty for the others.
        difference: mean absolute difference of its probabilities from TensorFlow's.
        failure: why it has no figures.
    """

    name: str
    img_per_s: dict[int, list[float]] = field(default_factory=dict)
    precision: str = ""
    difference: float = float("nan")
    failure: str = ""


@dataclass
class Comparison:
    """All subjects under the same instructions, round by round.

    Attributes:
        folder: what `prepare` laid out.
        pythons: the interpreter of each subject and of the matrix products.
        settings: how long and in which batches.
        isa: the instructions that all are held to; empty for those of the processor.
        subjects: by name.
        peaks: of the matrix product, GFLOP/s by number format, one value for each round.
        not_measured: why a matrix product has no figure, by number format.
        unchecked: why the subjects' answers were not compared with TensorFlow's; empty if they were.
    """

    folder: Path
    pythons: dict[str, str]
    settings: PeersSettings
    isa: str = ""
    subjects: dict[str, Subject] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    unchecked: str = ""

    def __post_init__(self) -> None:
        self.subjects = {name: Subject(name) for name in self.pythons if not name.startswith(GEMM)}
        if self.isa:
            for name in set(NOT_HELD) & set(self.subjects):
                self.subjects[name].failure = NOT_HELD[name]

    def measure(self, name: str) -> None:
        """Measure one subject once; what fails is noted, and not tried again."""
        if name.startswith(GEMM):
            self._measure_product(name[len(GEMM) :])
            return
        subject = self.subjects[name]
        for sizes in self._groups(name):
            if subject.failure:
                return
            try:
                found = self._call(name, sizes)
            except MeasureError as error:
                subject.failure = str(error)
                return
            subject.failure = found.get("skipped", "")
            subject.precision = found.get("precision", "")
            for size, rate in found.get("img_per_s", {}).items():
                subject.img_per_s.setdefault(int(size), []).append(rate)

    def _groups(self, name: str) -> list[Sequence[int]]:
        """The batch sizes by process: each has its own for PyTorch, which compiles a second shape worse."""
        sizes = self.settings.batch_sizes
        return [[size] for size in sizes] if name.startswith("pytorch") else [sizes]

    def _measure_product(self, number_format: str) -> None:
        if number_format in self.not_measured:
            return
        try:
            found = self._call(GEMM + number_format, ())
        except MeasureError as error:
            self.not_measured[number_format] = str(error)
            return
        if "skipped" in found:
            self.not_measured[number_format] = found["skipped"]
        else:
            self.peaks.setdefault(number_format, []).append(found["peak"])

    def _call(self, name: str, sizes: Sequence[int]) -> dict[str, Any]:
        seconds, limit_s = self.settings.seconds, self.settings.limit_s
        return call_worker(
            *(self.pythons[name], name, self.folder, seconds, sizes), limit_s=limit_s, environment=held_to(self.isa)
        )

    def finish(self) -> None:
        """Drop the figures of every subject that was not measured in all batches, or whose answer differs."""
        for subject in self.subjects.values():
            if not subject.failure and set(subject.img_per_s) != set(self.settings.batch_sizes):
                subject.failure = "the run ended before it was measured"
        answers = {path.stem: np.load(path) for path in (self.folder / "answers").glob("*.npy")}
        if REFERENCE not in answers:
            self.unchecked = f"TensorFlow gave no answer to compare with: {self.subjects[REFERENCE].failure}"
            return
        for subject in self.subjects.values():
            if not subject.failure:
                pairs = zip(answers[subject.name], answers[REFERENCE])
                subject.difference = float(np.mean([np.abs(one - other).mean() for one, other in pairs]))
                if not subject.difference <= LARGEST_MEAN_DIFFERENCE:
                    subject.failure = f"its answer differs from TensorFlow's by {subject.difference:.3g} in the mean"

    def speed_up(self, name: str, batch_size: int) -> list[float]:
        """Our engine's rate over a subject's, round by round, sorted."""
        ours, theirs = (self.subjects[one].img_per_s[batch_size] for one in (OURS, name))
        return ratios(ours, theirs)


def comparisons_of(settings: PeersSettings, folder: Path) -> list[Comparison]:
    """What is to be measured: with the processor's own instructions, and where asked held to fewer.

    Args:
        settings: what is compared.
        folder: an empty folder for what the workers read and write.
    """
    with_torch = settings.python.exists()
    names = [*dict.fromkeys([OURS, REFERENCE, *settings.subjects]), *(GEMM + one for one in NEEDS)]
    pythons = {name: str(settings.python) if name.startswith(("pytorch", GEMM)) else sys.executable for name in names}
    if not with_torch:
        pythons = {name: python for name, python in pythons.items() if python == sys.executable}
    return [Comparison(folder / (isa or "own"), pythons, settings, isa) for isa in dict.fromkeys(["", settings.isa])]


def run(settings: PeersSettings, comparisons: Sequence[Comparison]) -> None:
    """Measure every subject once in each round; whatever ends it, the comparisons keep what was measured.

    Raises:
        MeasureError: something that all need fails.
    """
    subjects = {
        f"{name} {one.isa}".strip(): partial(one.measure, name)
        for name in comparisons[0].pythons
        for one in comparisons
    }
    with Progress(1 + settings.rounds * len(subjects), each=True) as progress:
        if not settings.python.exists():
            progress.say(f"{settings.python} does not exist: PyTorch and the matrix product are left out")
        with progress.step("tiles and weights"):
            tiles = tiles_of(settings.data, max(settings.batch_sizes), settings.tile_size)
            for comparison in comparisons:
                comparison.folder.mkdir()
                prepare(comparison.folder, settings, tiles)

        def step(name: str) -> None:
            with progress.step(name):
                subjects[name]()

        interleave({name: partial(step, name) for name in subjects}, settings.rounds)
