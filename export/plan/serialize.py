"""A float16 ONNX file to a serialized TensorRT plan.

One code path for TensorRT 10.4 and TensorRT-RTX, which builds without a GPU and so lets graph, profiles and shapes be
checked anywhere. Networks are strongly typed, the one kind that TensorRT 11 has. Only TensorRT-RTX can be told which
GPU it builds for.

No plan of this project has been built or run on a V100 yet.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from export.errors import ExportError
from unet.engine.library import BuildLog, make_logger
from unet.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import tensorrt

    from export.plan.settings import BuildSettings, Profile
    from unet.engine.library import Library


def _set_compute_capabilities(trt: Library, config: Any, wanted: Sequence[str]) -> None:
    """Name the GPUs to build for, which only TensorRT-RTX can; TensorRT builds for the present one."""
    if not wanted:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise ExportError(f"TensorRT {trt.__version__} builds for the present GPU only: leave the others out")
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if member is None or not config.set_compute_capability(member, index):
            raise ExportError(f"{trt.__name__} {trt.__version__} does not build for compute capability {capability}")


def _parse(trt: Library, network: tensorrt.INetworkDefinition, logger: tensorrt.ILogger, model: Path) -> None:
    try:
        content = model.read_bytes()
    except OSError as error:
        raise ExportError(f"{model} cannot be read ({error.strerror}): export it with export/main.py") from error
    parser = trt.OnnxParser(network, logger)
    if not content or not parser.parse(content):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)] or ["it is empty"]
        raise ExportError(
            f"{model} is no ONNX graph that TensorRT takes ({' '.join(reasons[-1].split())}): export it again with "
            "export/main.py"
        )


def _add_profiles(
    builder: tensorrt.Builder,
    config: tensorrt.IBuilderConfig,
    network: tensorrt.INetworkDefinition,
    profiles: Sequence[Profile],
) -> None:
    inputs = [network.get_input(index).name for index in range(network.num_inputs)]
    if not profiles:
        raise ExportError("a plan for tiles of dynamic size needs an optimization profile: name a tile size")
    for number, wanted in enumerate(profiles):
        if wanted.tensor not in inputs:
            raise ExportError(
                f"profile {number} is of the input {wanted.tensor}, the graph has {', '.join(inputs)}: export it again"
            )
        profile = builder.create_optimization_profile()
        least, usual, most = wanted.shapes
        profile.set_shape(wanted.tensor, least, usual, most)
        if config.add_optimization_profile(profile) != number:
            raise ExportError(
                f"TensorRT refuses profile {number}, tiles of {wanted.tile_size} in batches of {wanted.batches[0]}, "
                f"{wanted.batches[1]} and {wanted.batches[2]}: the least must not be above the usual, nor that above "
                "the largest, and the graph must take them"
            )


def build_plan(trt: Library, model: Path, settings: BuildSettings, log: BuildLog) -> bytes:
    """Build a serialized plan.

    Args:
        trt: the library, see `load_library`.
        model: float16 ONNX file with the input `image`, UINT8 [N, 1, H, W].
        settings: how.
        log: takes all that the library says.

    Returns:
        The plan, to be written to a file.

    Raises:
        ExportError: the file is no graph that TensorRT takes, a profile does not fit it, or the build failed.
    """
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    # Each tensor has the type that it has in the ONNX file.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, logger, model)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_compute_capabilities(trt, config, settings.compute_capabilities)
    _add_profiles(builder, config, network, settings.profiles)
    with _timing_cache(config, settings.timing_cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT {trt.__version__} built no plan of {model}: {log.last_error}")
    return bytes(plan)


@contextlib.contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, path: Path | None) -> Iterator[None]:
    """Let a build use what former ones measured, and keep what it adds."""
    if path is None:
        yield
        return
    former = path.read_bytes() if path.exists() else b""
    # Another GPU's or release's cache is refused, and replaced after the build. A build without one is only slower.
    for content in (former, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            break
    yield
    kept = config.get_timing_cache()
    if kept is not None:
        with atomic_file(path) as aside:
            aside.write_bytes(bytes(kept.serialize()))


def inspect_plan(trt: Library, plan: bytes, log: BuildLog) -> str:
    """What a plan consists of, layer by layer, as TensorRT's own JSON. Needs the GPU that the plan is for.

    Raises:
        ExportError: the plan cannot be loaded here.
    """
    engine = trt.Runtime(make_logger(trt, log)).deserialize_cuda_engine(plan)
    if engine is None:
        raise ExportError(f"TensorRT {trt.__version__} cannot load the plan that it built: {log.last_error}")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
