"""Plans by the real builder of TensorRT-RTX, which needs no GPU; and what it is told wrongly on purpose."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.errors import ExportError
from export.plan.serialize import build_plan
from export.plan.settings import BuildSettings, Profile, check_target
from export.steps.graph import write_model
from unet.engine import EngineError
from unet.engine.device import Gpu
from unet.engine.library import BuildLog, load_library
from unet.engine.plan import check_fit
from unet.engine.targets import TARGETS

GPUS = ("7.5", "8.6")
SERVED = (Profile(572), Profile(700))


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: make install-rtx")


@pytest.fixture(scope="module")
def half_file(half: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "model.fp16.onnx"
    write_model(half, path)
    return path


def test_a_plan_is_built_for_each_gpu_that_the_library_offers(rtx: Any, half_file: Path) -> None:
    offered = [name[2:] for name in dir(rtx.ComputeCapability) if name.startswith("SM")]
    assert {"75", "80", "86", "89", "120"} <= set(offered)
    for name in offered:
        capability = f"{name[:-1]}.{name[-1]}"
        plan = build_plan(rtx, half_file, BuildSettings(SERVED[:1], compute_capabilities=(capability,)), BuildLog())
        assert len(plan) > 10_000


def test_one_plan_serves_both_tile_sizes_and_every_batch(rtx: Any, half_file: Path) -> None:
    log = BuildLog()
    plan = build_plan(rtx, half_file, BuildSettings(SERVED, compute_capabilities=GPUS), log)
    smaller = build_plan(rtx, half_file, BuildSettings(SERVED[:1], compute_capabilities=GPUS[:1]), BuildLog())
    assert len(plan) > len(smaller) > 10_000
    assert any("Engine generation completed" in text for _, text in log.lines)
    assert not [text for severity, text in log.lines if "ERROR" in severity]


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX")
def test_a_timing_cache_is_kept_and_taken_again(rtx: Any, half_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "half.timing"
    settings = BuildSettings(SERVED[:1], timing_cache=cache, compute_capabilities=GPUS[:1])
    for content in (None, b"not a timing cache"):
        if content is not None:
            cache.write_bytes(content)
        build_plan(rtx, half_file, settings, BuildLog())
        assert len(cache.read_bytes()) > 20


@pytest.mark.parametrize(
    ("profiles", "sentence"),
    [
        ((), "needs an optimization profile"),
        ((Profile(572, tensor="images"),), "profile 0 is of the input images, the graph has image"),
        ((Profile(572, batches=(9, 8, 16)),), "refuses profile 0, tiles of 572 in batches of 9, 8 and 16"),
    ],
)
def test_profiles_that_do_not_fit(rtx: Any, half_file: Path, profiles: tuple[Profile, ...], sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        build_plan(rtx, half_file, BuildSettings(profiles), BuildLog())


def mixed_types() -> onnx.ModelProto:
    """A float16 tensor and a float32 one in one convolution."""
    weights = numpy_helper.from_array(np.ones((1, 1, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "w"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT16, ["N", 1, "h", "w"])],
        [weights],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        (b"", "no ONNX graph that TensorRT takes .it is empty"),
        (b"garbage", "no ONNX graph that TensorRT takes"),
        (mixed_types().SerializeToString(), "no ONNX graph that TensorRT takes|built no plan"),
    ],
    ids=["missing", "empty", "garbage", "mixed types"],
)
def test_files_that_are_no_graph(rtx: Any, tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ExportError, match=sentence) as caught:
        build_plan(rtx, path, BuildSettings(SERVED[:1]), BuildLog())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_the_library_does_not_build_for(rtx: Any, half_file: Path) -> None:
    with pytest.raises(ExportError, match=r"does not build for compute capability 7\.0"):
        build_plan(rtx, half_file, BuildSettings(SERVED[:1], compute_capabilities=("7.0",)), BuildLog())


@pytest.mark.slow
def test_the_published_size_is_built_in_seconds(
    rtx: Any, random_saved_model: Callable[..., None], tmp_path: Path
) -> None:
    from export.steps.half_precision import to_half
    from export.steps.to_onnx import convert
    from serve.measure.peers.table import convolution_gflop

    random_saved_model(tmp_path / "saved_model", 64)
    single = convert(tmp_path / "saved_model")
    write_model(single, tmp_path / "model.onnx")
    # By hand, of the published network.
    assert convolution_gflop(tmp_path / "model.onnx", 572) == pytest.approx(300.86, abs=0.005)
    write_model(to_half(single), tmp_path / "model.fp16.onnx")
    started = time.perf_counter()
    settings = BuildSettings(SERVED, compute_capabilities=GPUS)
    plan = build_plan(rtx, tmp_path / "model.fp16.onnx", settings, BuildLog())
    sys.stdout.write(f"64 filters, 2 profiles, 2 GPUs: {time.perf_counter() - started:.1f} s\n")
    assert len(plan) > 31_000_000 * 2


def test_a_v100_and_the_tensorrt_of_its_triton_are_taken() -> None:
    check_target(TARGETS["v100"], "10.4.0", "7.0")
    check_target(TARGETS["v100"], "10.4.0.26", "7.0")


@pytest.mark.parametrize(
    ("target", "version", "capability", "sentence"),
    [
        ("v100", "10.5.0", "7.0", r"TensorRT 10\.5\.0 builds plans that Triton 24\.09 cannot load, which has 10\.4\.0"),
        ("v100", "8.6.1", "7.0", r"TensorRT 8\.6\.1 .* install tensorrt==10\.4\.0"),
        ("a100", "10.4.1", "8.0", r"TensorRT 10\.4\.1 builds plans"),
        ("v100", "10.4.0", "8.0", r"this GPU has compute capability 8\.0, the target v100 has 7\.0"),
    ],
)
def test_other_releases_and_gpus_are_refused(target: str, version: str, capability: str, sentence: str) -> None:
    with pytest.raises(ExportError, match=sentence):
        check_target(TARGETS[target], version, capability)


def test_a_plan_runs_only_where_it_was_built() -> None:
    facts, here = {"compute_capability": "7.0"}, Gpu("Tesla V100-SXM2-16GB", "7.0")
    check_fit(facts, "10.4.0", here, "10.4.0")
    with pytest.raises(EngineError, match=r"compute capability 7\.0, this GPU \(A10\) has 8\.6"):
        check_fit(facts, "10.4.0", Gpu("A10", "8.6"), "10.4.0")
    with pytest.raises(EngineError, match=r"by TensorRT 10\.4\.0, this machine has 8\.6\.1"):
        check_fit(facts, "10.4.0", here, "8.6.1")


@pytest.mark.parametrize("module", ["export.plan.build", "unet.engine.plan"])
def test_without_artefacts_it_is_one_sentence(project_root: Path, tmp_path: Path, module: str) -> None:
    line = [sys.executable, "-m", module, "--artefacts", str(tmp_path)]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "card.json does not exist" in done.stderr


def test_a_machine_without_tensorrt_says_what_to_install() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(EngineError, match=r"pip install 'unet-medical-triton\[gpu\]'"):
            load_library("tensorrt")
    else:
        assert load_library("tensorrt").Builder
