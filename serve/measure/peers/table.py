"""The result of a comparison as Markdown: rates, ratios with their spread, and bars met or missed."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serve.measure.peers.comparison import OURS
from serve.measure.tables import NOT_MEASURED
from unet.measure import markdown, ratios

if TYPE_CHECKING:
    from collections.abc import Sequence

    from serve.measure.peers.comparison import Comparison

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
_FRAMEWORKS = tuple(name for name in LABELS if name not in (OURS, "openvino"))
_DEFAULTS = ("tensorflow", "onnxruntime", "pytorch")


@dataclass(frozen=True)
class Bar:
    """What the engine should reach: its rate over that of the fastest of some peers.

    Attributes:
        title: in words.
        peers: whose fastest, round by round, is the measure.
        wanted: the least ratio.
    """

    title: str
    peers: tuple[str, ...]
    wanted: float


BARS = (
    Bar("engine / TensorFlow, its defaults", ("tensorflow",), 5.0),
    Bar("engine / OpenVINO, its defaults", ("openvino",), 2.0),
    Bar("engine / the fastest of TensorFlow, ONNX Runtime and PyTorch with any switch", _FRAMEWORKS, 2.5),
)
# On a processor without bfloat16 and 8-bit instructions.
HELD_BARS = (
    Bar("engine / the fastest of TensorFlow, ONNX Runtime and PyTorch at their defaults", _DEFAULTS, 3.0),
    Bar("engine / OpenVINO, its defaults", ("openvino",), 1.5),
)
PRODUCT_WANTED = 0.95


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


def table(comparison: Comparison) -> str:
    """The rates, and the engine's over each of them with its spread."""
    sizes = comparison.settings.batch_sizes
    lines = []
    for name, subject in comparison.subjects.items():
        if subject.failure:
            cells = [NOT_MEASURED, *["-"] * (2 * len(sizes) - 1), subject.failure.replace("|", "/")[:120]]
        else:
            rates = [f"{statistics.median(subject.img_per_s[size]):.2f}" for size in sizes]
            cells = [*rates, *(_speed_up(comparison, name, size) for size in sizes), f"{subject.difference:.1e}"]
        lines.append([LABELS[name], *cells])
    head = [f"img/s, batch {size}" for size in sizes] + [f"engine / this, batch {size}" for size in sizes]
    return markdown(["subject", *head, "mean difference"], lines)


def _speed_up(comparison: Comparison, name: str, size: int) -> str:
    if comparison.subjects[OURS].failure:
        return "-"
    each = comparison.speed_up(name, size)
    return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"


@dataclass(frozen=True)
class Reached:
    """One bar and what was reached, by batch size; None where it was not measured."""

    title: str
    wanted: float
    ratios: dict[int, float | None]

    @property
    def verdict(self) -> str:
        """Whether it was met at every batch size."""
        known = [ratio for ratio in self.ratios.values() if ratio is not None]
        if len(known) < len(self.ratios):
            return NOT_MEASURED
        return "met" if min(known) >= self.wanted else "missed"


def bars(comparison: Comparison, gflop: float) -> list[Reached]:
    """Every bar of a comparison, and what was reached.

    Args:
        comparison: the measured one.
        gflop: arithmetic of a tile.
    """
    sizes = comparison.settings.batch_sizes
    reached = [
        Reached(bar.title, bar.wanted, {size: _over_fastest(comparison, bar.peers, size) for size in sizes})
        for bar in (HELD_BARS if comparison.isa else BARS)
    ]
    precision = comparison.subjects[OURS].precision
    if not precision:
        return reached
    share = _over_product(comparison, gflop, precision, sizes[0])
    title = f"engine / matrix product in {GEMM_FORMATS[precision]}, batch {sizes[0]}"
    return [*reached, Reached(title, PRODUCT_WANTED, {sizes[0]: share})]


def _over_fastest(comparison: Comparison, peers: Sequence[str], size: int) -> float | None:
    """The engine's rate over that of the fastest of some peers in the same round, the median of the rounds."""
    subjects = [comparison.subjects[name] for name in peers if name in comparison.subjects]
    theirs = [subject.img_per_s[size] for subject in subjects if not subject.failure]
    ours = comparison.subjects[OURS]
    if ours.failure or not theirs:
        return None
    return statistics.median(ratios(ours.img_per_s[size], [max(rates) for rates in zip(*theirs)]))


def _over_product(comparison: Comparison, gflop: float, precision: str, size: int) -> float | None:
    peaks, ours = comparison.peaks.get(GEMM_FORMATS[precision]), comparison.subjects[OURS]
    if ours.failure or not peaks:
        return None
    return statistics.median(ratios([rate * gflop for rate in ours.img_per_s[size]], peaks))


def bar_table(reached: Sequence[Reached], sizes: Sequence[int]) -> str:
    """Bars met or missed, one a line."""
    lines = []
    for one in reached:
        cells = [one.ratios.get(size) for size in sizes]
        lines.append(
            [one.title, f"{one.wanted:g}", *("-" if cell is None else f"{cell:.2f}" for cell in cells), one.verdict]
        )
    return markdown(["bar", "wanted", *(f"batch {size}" for size in sizes), ""], lines)


def report(comparison: Comparison, gflop: float) -> str:
    """Everything about one comparison, as Markdown."""
    sizes = comparison.settings.batch_sizes
    where = f"held to {comparison.isa}" if comparison.isa else "with all instructions"
    parts = [f"This project's engine computes in {comparison.subjects[OURS].precision or '?'} {where}:"]
    parts += [table(comparison), bar_table(bars(comparison, gflop), sizes)]
    peaks = {name: statistics.median(values) for name, values in comparison.peaks.items()}
    if peaks:
        products = ", ".join(f"{name} {peak:.0f}" for name, peak in peaks.items())
        parts.append(f"{gflop:.1f} GFLOP a tile; matrix product, GFLOP/s (int8: GOP/s): {products}.")
    parts += [comparison.unchecked] if comparison.unchecked else []
    parts += [f"matrix product in {name}: {NOT_MEASURED}: {why}" for name, why in comparison.not_measured.items()]
    return "\n\n".join(parts)
