from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from export.errors import ParityError
from export.gate.half_arithmetic import HalfArithmetic
from export.gate.parity import HALF_ARITHMETIC, HALF_WEIGHTS, compare
from export.gate.proof import Evidence, Step, prove
from export.gate.tiles import Tiles
from export.steps import scaling
from export.steps.graph import constants, write_model
from export.steps.half_precision import to_half
from unet.engine.cpu import CpuEngine, EngineChoice

ORT = EngineChoice("onnxruntime", "f32")


def rescaled(single: Any) -> onnx.ModelProto:
    """An equal network: two convolutions multiply by 256 each, and the two on either way after them divide by it."""
    by = {"down0_conv1/Conv": 2.0**-8, "down0_conv2/Conv": 2.0**-16}
    by |= {"down1_conv1/Conv": 2.0**-8, "up0_conv1/Conv": 2.0**-8}
    return scaling.divided(copy.deepcopy(single), by)


def by_hand(model: Any, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The first layer in NumPy: float16 in, sums in float32, the result rounded to float16."""
    nodes = {node.name: node for node in model.graph.node}
    first = nodes["down0_conv1/Conv"]
    values = constants(model)
    weights, bias = (values[name].astype(np.float32) for name in first.input[1:])
    pixels = ((image.astype(np.float32) - 127.5) / 128).astype(np.float16).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(pixels[0, 0], (3, 3))
    summed = np.einsum("yxij,oij->oyx", windows, weights[:, 0]) + bias[:, None, None]
    return np.asarray(summed, np.float16)


def test_each_result_is_rounded_and_sums_are_not(half: Any, tiles: Tiles) -> None:
    tile = tiles.batches[0][:1]
    cut = onnx.ModelProto.FromString(half.SerializeToString())
    relu = next(node for node in cut.graph.node if node.input[0] == "down0_conv1/Conv")
    position = list(cut.graph.node).index(relu)
    del cut.graph.node[position:]
    used = {name for node in cut.graph.node for name in node.input}
    kept = [stored for stored in cut.graph.initializer if stored.name in used]
    del cut.graph.initializer[:]
    cut.graph.initializer.extend(kept)
    cut.graph.output[0].name = "down0_conv1/Conv"
    found = HalfArithmetic(cut).infer(tile)[0]
    due = by_hand(half, tile)
    # The order of summation may decide a rounding here and there, by one step of float16.
    assert (found == due).mean() > 0.999
    np.testing.assert_allclose(found.astype(np.float32), due.astype(np.float32), rtol=2**-10, atol=2**-10)
    # Without rounding in between, nearly every number would be another one.
    exact = HalfArithmetic(cut, rounded=False)
    assert exact.peaks.keys() == {"centre", "shrink", "down0_conv1/Conv"}
    exact.infer(tile)
    assert exact.peaks["down0_conv1/Conv"] == pytest.approx(np.abs(due.astype(np.float64)).max(), rel=1e-3)


def test_it_differs_from_float32_on_the_same_weights(half: Any, tiles: Tiles, tmp_path: Path) -> None:
    write_model(half, tmp_path / "half.onnx")
    engine = CpuEngine(tmp_path / "half.onnx", ORT)
    found = [HalfArithmetic(half).infer(batch) for batch in tiles.batches]
    due = [engine.infer(batch) for batch in tiles.batches]
    result = compare("onnx_fp16", "float32", found, due, HALF_ARITHMETIC).check()
    # What the CPU's libraries show is nothing of this.
    assert result.mean_difference > 1e-5


def test_an_equal_network_that_overflows_is_refused_though_every_engine_here_accepts_it(
    single: Any, tiles: Tiles, tmp_path: Path
) -> None:
    model = to_half(rescaled(single))
    write_model(model, tmp_path / "half.onnx")
    write_model(single, tmp_path / "single.onnx")
    due = [CpuEngine(tmp_path / "single.onnx", ORT).infer(batch) for batch in tiles.batches]
    for kind in ("onnxruntime", "openvino"):
        engine = CpuEngine(tmp_path / "half.onnx", EngineChoice(kind, "f32"))
        found = [engine.infer(batch) for batch in tiles.batches]
        compare(kind, "onnx", found, due, HALF_WEIGHTS).check()
    step = Step("onnx_fp16", tmp_path / "half.onnx", HalfArithmetic(model).infer, HALF_ARITHMETIC, {})
    with pytest.raises(ParityError, match=r"down0_conv2/Conv overflows: it reaches \S+, float16 ends at 65504"):
        prove(step, Evidence(tiles, {}), lambda _: None)


def test_layers_that_need_it_are_divided_to_an_equal_network_that_passes(single: Any, tiles: Tiles) -> None:
    model = rescaled(single)
    exact = HalfArithmetic(model, rounded=False)
    due = [exact.infer(batch) for batch in tiles.batches]
    by = scaling.factors(exact.peaks)
    assert "down0_conv2/Conv" in by
    assert all(np.log2(factor).is_integer() for factor in by.values())
    rounded = HalfArithmetic(to_half(scaling.divided(model, by)))
    found = [rounded.infer(batch) for batch in tiles.batches]
    compare("onnx_fp16", "onnx", found, due, HALF_ARITHMETIC).check()
    assert all(peak <= scaling.HIGHEST for peak in rounded.peaks.values())


def test_dividing_by_powers_of_two_changes_no_bit(single: Any, tiles: Tiles) -> None:
    convolutions = [node.name for node in single.graph.node if node.op_type == "Conv" and "logits" not in node.name]
    by = {name: 2.0 ** (number % 5 - 2) for number, name in enumerate(convolutions)}
    for batch in tiles.batches:
        due = HalfArithmetic(single, rounded=False).infer(batch)
        np.testing.assert_array_equal(HalfArithmetic(scaling.divided(single, by), rounded=False).infer(batch), due)


def test_a_network_that_needs_none_is_left_as_it_is(single: Any, tiles: Tiles) -> None:
    exact = HalfArithmetic(single, rounded=False)
    exact.infer(tiles.batches[0])
    assert scaling.factors(exact.peaks) == {}
    assert scaling.factors({"a/Conv": 8188.0, "b/Conv": 0.0, "logits/Conv": 9e9, "centre": 9e9}) == {}
    assert scaling.factors({"a/Conv": 65536.0, "b/Conv": 1 / 64}) == {"a/Conv": 4096.0, "b/Conv": 2.0**-10}
