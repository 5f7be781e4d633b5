"""The same network by other means, in one interleaved run: ``python serve/peers.py`` (``make peers``).

Each subject has the same weights and the same tiles, is measured in a process of its own in every round, one after
another, and its answer is compared with TensorFlow's. The machine's own limit is measured in the same rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from unet.errors import UnetError
from unet.measure import interleave, ratios
from unet.processes import child

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

WORKER = Path(__file__).with_name("peer_worker.py")
OURS, REFERENCE = "engine", "tensorflow"
LABELS = {
    "engine": "this project's engine",
    "openvino": "OpenVINO, its defaults",
    "onnxruntime": "ONNX Runtime, its defaults",
    "tensorflow": "TensorFlow SavedModel, float32",
    "tensorflow_bf16": "TensorFlow SavedModel, bfloat16",
    "pytorch": "PyTorch eager, float32",
    "pytorch_compiled": "PyTorch compiled, float32",
    "pytorch_bf16": "PyTorch compiled, bfloat16",
}
GEMM_FORMATS = {"f32": "float32", "bf16": "bfloat16", "int8": "int8"}
# A subject that computes another function is no peer. bf16 keeps 8 bits of each product's operands.
LARGEST_MEAN_DIFFERENCE = 0.02


class PeersError(UnetError):
    """A comparison that cannot be made."""


@dataclass
class Subject:
    """What one subject came to.

    Attributes:
        img_per_s: by batch size, one value for each round.
        difference: mean absolute difference of its probabilities from TensorFlow's.
        failure: why it has no figures.
    """

    name: str
    img_per_s: dict[int, list[float]] = field(default_factory=dict)
    difference: float = float("nan")
    failure: str = ""


def convolution_gflop(model: Path, tile_size: int) -> float:
    """Arithmetic of a graph's convolutions for one tile, in GFLOP: 2 x multiply-adds.

    Args:
        model: ONNX file with dynamic height and width.
        tile_size: input height and width.
    """
    import onnx
    from onnx import shape_inference

    graph = onnx.load(str(model))
    for place, value in zip((0, 2, 3), (1, tile_size, tile_size)):
        graph.graph.input[0].type.tensor_type.shape.dim[place].dim_value = value
    inferred = shape_inference.infer_shapes(graph, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    kernels = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    total = 0
    for node in inferred.node:
        if node.op_type == "Conv":
            total += int(np.prod(kernels[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
    return 2 * total / 1e9


def prepare(folder: Path, model_dir: Path, artefacts: Path, tiles: npt.NDArray[np.uint8]) -> None:
    """Lay out what the workers read: tiles, the SavedModel, its weights, the ONNX graph and the artefacts."""
    import tensorflow as tf

    (folder / "saved_model").symlink_to((model_dir / "saved_model").resolve())
    (folder / "artefacts").symlink_to(artefacts.resolve())
    (folder / "model.onnx").symlink_to((artefacts / "model.onnx").resolve())
    np.save(folder / "tiles.npy", tiles)
    variables = tf.saved_model.load(str(model_dir / "saved_model")).model.variables
    np.savez(folder / "weights.npz", *(variable.numpy() for variable in variables))


def call_worker(python: str, name: str, folder: Path, seconds: float, batch_sizes: Sequence[int]) -> dict[str, Any]:
    """Run one subject once.

    Raises:
        PeersError: if it fails, with its last words.
    """
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    with child([python, str(WORKER), name, str(folder), str(seconds), *map(str, batch_sizes)], log=log) as process:
        process.wait()
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if process.returncode != 0 or not said:
        raise PeersError(said[-1] if said else f"it ended with exit code {process.returncode}")
    found: dict[str, Any] = json.loads(said[-1])
    return found


@dataclass
class Comparison:
    """All subjects, round by round.

    Attributes:
        pythons: the interpreter that each subject runs in.
        peaks: of the matrix product, GFLOP/s by number format, one value for each round.
    """

    folder: Path
    pythons: dict[str, str]
    seconds: float
    batch_sizes: Sequence[int]
    subjects: dict[str, Subject] = field(default_factory=dict)
    peaks: dict[str, list[float]] = field(default_factory=dict)

    def run(self, rounds: int) -> None:
        """Measure every subject once in each round."""
        self.subjects = {name: Subject(name) for name in self.pythons if name != "gemm"}
        with tqdm(total=rounds * len(self.pythons), unit="subject", disable=None) as bar:
            interleave({name: partial(self._measure, name, bar) for name in self.pythons}, rounds)
        self._compare_answers()

    def _measure(self, name: str, bar: Any) -> None:
        bar.update()
        bar.set_postfix_str(name)
        subject = self.subjects.get(name)
        if subject is not None and subject.failure:
            return
        try:
            found = call_worker(self.pythons[name], name, self.folder, self.seconds, self.batch_sizes)
        except PeersError as error:
            if subject is None:
                bar.write(f"the matrix product could not be measured: {error}", file=sys.stderr)
            else:
                subject.failure = str(error)
            return
        if subject is None:
            for number_format, peak in found["peak"].items():
                self.peaks.setdefault(number_format, []).append(peak)
            return
        for size, rate in found["img_per_s"].items():
            subject.img_per_s.setdefault(int(size), []).append(rate)

    def _compare_answers(self) -> None:
        answers = {path.stem: np.load(path) for path in (self.folder / "answers").glob("*.npy")}
        if REFERENCE not in answers:
            raise PeersError(f"TensorFlow gave no answer to compare with: {self.subjects[REFERENCE].failure}")
        for subject in self.subjects.values():
            if not subject.failure:
                subject.difference = float(np.abs(answers[subject.name] - answers[REFERENCE]).mean())
                if not subject.difference <= LARGEST_MEAN_DIFFERENCE:
                    subject.failure = f"its answer differs from TensorFlow's by {subject.difference:.3g} in the mean"

    def speed_up(self, name: str, batch_size: int) -> list[float]:
        """Our engine's rate over a subject's, round by round, sorted."""
        ours, theirs = (self.subjects[one].img_per_s[batch_size] for one in (OURS, name))
        return ratios(ours, theirs)


def table(comparison: Comparison, gflop: float, precision: str) -> str:
    """The rates, the ratios with their spread, and the share of the machine's own limit, as Markdown."""
    sizes = comparison.batch_sizes
    head = [f"img/s, batch {size}" for size in sizes] + [f"engine / this, batch {size}" for size in sizes]
    lines = [f"| subject | {' | '.join(head)} | mean difference |", "|---" * (2 * len(sizes) + 2) + "|"]
    for name, subject in comparison.subjects.items():
        if subject.failure:
            cells = ["not measured"] * 2 * len(sizes) + [subject.failure.replace("|", "/")[:120]]
        else:
            rates = [f"{statistics.median(subject.img_per_s[size]):.2f}" for size in sizes]
            speed_ups = [comparison.speed_up(name, size) for size in sizes]
            spread = [f"{statistics.median(r):.2f} ({r[0]:.2f} to {r[-1]:.2f})" for r in speed_ups]
            cells = [*rates, *spread, f"{subject.difference:.1e}"]
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    if comparison.peaks and not comparison.subjects[OURS].failure:
        peak = statistics.median(comparison.peaks[GEMM_FORMATS[precision]])
        rate = statistics.median(comparison.subjects[OURS].img_per_s[sizes[0]])
        lines += [
            "",
            f"{gflop:.1f} GFLOP a tile; matrix product in {GEMM_FORMATS[precision]}: {peak:.0f} GFLOP/s; the engine "
            f"at batch {sizes[0]}: {rate * gflop:.0f} GFLOP/s, {rate * gflop / peak:.0%} of it.",
        ]
    return "\n".join(lines)


def tiles_of(data: Path | None, count: int, size: int) -> npt.NDArray[np.uint8]:
    """Tiles of real slices where there are some, else of the synthetic stack: uint8 [N, 1, S, S]."""
    if data is not None:
        from unet.volume import StackReader

        with StackReader(data) as reader:
            slices = [page for page, _ in zip(reader, range(count))]
        if slices[0].dtype != np.uint8:
            raise PeersError(f"{data} is {slices[0].dtype}: name an 8-bit stack")
    else:
        from unet.phantom import synthetic_stack

        slices = list(synthetic_stack(slices=4, size=size, seed=0)[0])
    fill = [max(0, size - side) for side in slices[0].shape]
    padded = [np.pad(one, [(0, by) for by in fill], mode="reflect")[:size, :size] for one in slices]
    tiles: npt.NDArray[np.uint8] = np.stack([padded[index % len(padded)] for index in range(count)])[:, np.newaxis]
    return tiles
