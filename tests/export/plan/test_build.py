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

from export.plan.build import (
    BuildSettings,
    EngineBuildError,
    Profile,
    build_plan,
    check_target,
)
from export.plan.targets import TARGETS
from export.steps.graph import write_model
from unet.engine.device import Gpu
from unet.engine.library import BuildLog, load_library
from unet.engine.plan import EngineRunError, check_fit

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
    with pytest.raises(EngineBuildError, match=sentence):
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
    with pytest.raises(EngineBuildError, match=sentence) as caught:
        build_plan(rtx, path, BuildSettings(SERVED[:1]), BuildLog())
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_the_library_does_not_build_for(rtx: Any, half_file: Path) -> None:
    with pytest.raises(EngineBuildError, match=r"does not build for compute capability 7\.0"):
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


@pytest.mark.parametrize("version", ["8.6.1", "10.0.1", "10.4.0"])
def test_a_v100_and_its_releases_are_taken(version: str) -> None:
    check_target(TARGETS["v100"], version, "7.0")


@pytest.mark.parametrize(
    ("target", "version", "capability", "sentence"),
    [
        (
            "v100",
            "10.5.0",
            "7.0",
            r"TensorRT 10\.5\.0 .* compute capability 7\.0: install 8\.6 to 10\.4",
        ),
        ("v100", "8.5.3", "7.0", r"TensorRT 8\.5\.3 does not build"),
        ("v100", "10.4.0", "8.0", r"this GPU has compute capability 8\.0, the target 7\.0"),
        ("a100", "8.5.1", "8.0", "any newer one"),
    ],
)
def test_other_releases_and_gpus_are_refused(target: str, version: str, capability: str, sentence: str) -> None:
    with pytest.raises(EngineBuildError, match=sentence):
        check_target(TARGETS[target], version, capability)


def test_a_plan_runs_only_where_it_was_built() -> None:
    facts, here = {"compute_capability": "7.0"}, Gpu("Tesla V100-SXM2-16GB", "7.0")
    check_fit(facts, "10.4.0", here, "10.4.0")
    with pytest.raises(EngineRunError, match=r"compute capability 7\.0, this GPU \(A10\) has 8\.6"):
        check_fit(facts, "10.4.0", Gpu("A10", "8.6"), "10.4.0")
    with pytest.raises(EngineRunError, match=r"by TensorRT 10\.4\.0, this machine has 8\.6\.1"):
        check_fit(facts, "10.4.0", here, "8.6.1")


@pytest.mark.parametrize("program", ["engine_build.py", "engine_run.py"])
def test_without_artefacts_it_is_one_sentence(project_root: Path, tmp_path: Path, program: str) -> None:
    line = [sys.executable, f"export/{program}", "--artefacts", str(tmp_path)]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "card.json does not exist" in done.stderr


def test_a_machine_without_tensorrt_says_what_to_install() -> None:
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        with pytest.raises(EngineBuildError, match=r"pip install 'unet-medical-triton\[gpu\]'"):
            load_library("tensorrt")
    else:
        assert load_library("tensorrt").Builder
