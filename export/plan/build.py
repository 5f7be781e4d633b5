"""A float16 ONNX file to a TensorRT plan: ``python -m export.plan.build --artefacts artefacts --target v100``.

One code path for TensorRT 8.6 and 10.x and for TensorRT-RTX, which builds without a GPU and so lets graph, profiles and
shapes be checked anywhere. They differ in three places: how a network is made to compute in float16
(`_network_flags`, `_set_precision`), and whether the GPU can be named (`_set_compute_capabilities`).

No plan of this project has been built or run on a V100 yet.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.plan.targets import TARGETS, Target
from export.plan.trtexec import BATCHES, write_script
from export.provenance import shell, versions, write_card
from unet.card import Card
from unet.engine.device import gpu
from unet.engine.library import BuildLog, load_library, make_logger, release_of
from unet.errors import UnetError, command, say
from unet.files import atomic_file
from unet.names import HALF_FILE, INPUT, PLAN_FILE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import tensorrt

    from unet.engine.library import Library


BUILD_LOG, INSPECTION = "plan.log", "plan.json"
_GIB = 1 << 30


class EngineBuildError(UnetError):
    """A plan that cannot be built here, or that TensorRT did not build."""


@dataclass(frozen=True)
class Profile:
    """The shapes that one optimization profile of a plan serves: one tile size, every batch from the least to the most.

    Attributes:
        tile_size: height and width of the tiles.
        batches: least, usual and largest batch; TensorRT tunes for the usual one.
        tensor: the input that it is of.
    """

    tile_size: int
    batches: tuple[int, int, int] = BATCHES
    tensor: str = INPUT

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The input's least, usual and largest shape, [N, 1, S, S]."""
        return tuple((batch, 1, self.tile_size, self.tile_size) for batch in self.batches)


@dataclass(frozen=True)
class BuildSettings:
    """How a plan is built.

    Attributes:
        profiles: one for each tile size; their order is that of the card's tile sizes.
        workspace_bytes: most scratch memory that a layer may take on the GPU.
        optimization_level: 0 to 5, how long TensorRT looks for faster kernels.
        timing_cache: file that keeps measured kernels from one build to the next; None for none.
        compute_capabilities: GPUs to build for, where the library builds for others than the present one.
    """

    profiles: tuple[Profile, ...]
    workspace_bytes: int = 4 * _GIB
    optimization_level: int = 5
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()


def check_target(target: Target, version: str, compute_capability: str) -> None:
    """Refuse a TensorRT or a GPU that a target's plan cannot be built with.

    Raises:
        EngineBuildError: naming both sides.
    """
    release = release_of(version)
    if release < target.oldest or (target.newest is not None and release > target.newest):
        last = ".".join(map(str, target.newest)) if target.newest else "any newer one"
        raise EngineBuildError(
            f"TensorRT {version} does not build for compute capability {target.compute_capability}: install "
            f"{'.'.join(map(str, target.oldest))} to {last}"
        )
    if compute_capability != target.compute_capability:
        raise EngineBuildError(
            f"this GPU has compute capability {compute_capability}, the target {target.compute_capability}: build on "
            "the machine that serves, or name its --target"
        )


def _network_flags(trt: Library) -> int:
    """Types as they are in the ONNX file where the library can (10.x, RTX); 8.6 must be told of explicit batches."""
    flags = trt.NetworkDefinitionCreationFlag
    chosen = flags.STRONGLY_TYPED if hasattr(flags, "STRONGLY_TYPED") else flags.EXPLICIT_BATCH
    return 1 << int(chosen)


def _set_precision(trt: Library, config: tensorrt.IBuilderConfig) -> None:
    """8.6 chooses types by speed: float16 must be allowed, and the file's types be kept."""
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        config.set_flag(trt.BuilderFlag.FP16)
        config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)


def _set_compute_capabilities(trt: Library, config: Any, wanted: Sequence[str]) -> None:
    """Name the GPUs to build for, which only TensorRT-RTX can; TensorRT builds for the present one."""
    if not wanted:
        return
    if not hasattr(trt, "ComputeCapability"):
        raise EngineBuildError(f"TensorRT {trt.__version__} builds for the present GPU only: leave the others out")
    config.num_compute_capabilities = len(wanted)
    for index, capability in enumerate(wanted):
        member = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
        if member is None or not config.set_compute_capability(member, index):
            raise EngineBuildError(
                f"{trt.__name__} {trt.__version__} does not build for compute capability {capability}"
            )


def _parse(trt: Library, network: tensorrt.INetworkDefinition, logger: tensorrt.ILogger, model: Path) -> None:
    try:
        content = model.read_bytes()
    except OSError as error:
        raise EngineBuildError(f"{model} cannot be read ({error.strerror}): export it with export/main.py") from error
    parser = trt.OnnxParser(network, logger)
    if not content or not parser.parse(content):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)] or ["it is empty"]
        raise EngineBuildError(
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
        raise EngineBuildError("a plan for tiles of dynamic size needs an optimization profile: name a tile size")
    for number, wanted in enumerate(profiles):
        if wanted.tensor not in inputs:
            raise EngineBuildError(
                f"profile {number} is of the input {wanted.tensor}, the graph has {', '.join(inputs)}: export it again"
            )
        profile = builder.create_optimization_profile()
        least, usual, most = wanted.shapes
        profile.set_shape(wanted.tensor, least, usual, most)
        if config.add_optimization_profile(profile) != number:
            raise EngineBuildError(
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
        EngineBuildError: the file is no graph that TensorRT takes, a profile does not fit it, or the build failed.
    """
    logger = make_logger(trt, log)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    _parse(trt, network, logger, model)
    config = builder.create_builder_config()
    _set_precision(trt, config)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    config.builder_optimization_level = settings.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    _set_compute_capabilities(trt, config, settings.compute_capabilities)
    _add_profiles(builder, config, network, settings.profiles)
    with _timing_cache(config, settings.timing_cache):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineBuildError(f"TensorRT {trt.__version__} built no plan of {model}: {log.last_error}")
    return bytes(plan)


@contextlib.contextmanager
def _timing_cache(config: tensorrt.IBuilderConfig, path: Path | None) -> Iterator[None]:
    """Let a build use what former ones measured, and keep what it adds."""
    if path is None:
        yield
        return
    former = path.read_bytes() if path.exists() else b""
    # Another GPU's or release's cache is refused, and replaced after the build.
    if not config.set_timing_cache(config.create_timing_cache(former), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)
    yield
    with atomic_file(path) as aside:
        aside.write_bytes(bytes(config.get_timing_cache().serialize()))


def inspect_plan(trt: Library, plan: bytes, log: BuildLog) -> str:
    """What a plan consists of, layer by layer, as TensorRT's own JSON. Needs the GPU that the plan is for.

    Raises:
        EngineBuildError: the plan cannot be loaded here.
    """
    engine = trt.Runtime(make_logger(trt, log)).deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineBuildError(f"TensorRT {trt.__version__} cannot load the plan that it built: {log.last_error}")
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def build_into(artefacts: Path, target_name: str, settings: BuildSettings | None = None) -> Path:
    """Build the plan of exported artefacts for the GPU of this machine, and enter it on their card.

    Args:
        artefacts: folder that export/main.py wrote; the plan, its log and TensorRT's inspection come beside the rest.
        target_name: one of `TARGETS`.
        settings: how; by default one profile for each of the card's tile sizes, and a timing cache beside the folder.

    Returns:
        The plan.

    Raises:
        CardError: the artefacts are not what their card says.
        EngineBuildError: there is no such TensorRT or GPU, or the build failed; its log is kept.
    """
    card = Card.load(artefacts)
    model = card.verify("onnx_fp16")
    trt = load_library("tensorrt")
    device = gpu()
    check_target(TARGETS[target_name], trt.__version__, device.compute_capability)
    settings = settings or BuildSettings(
        tuple(Profile(size) for size in card.tile_sizes), timing_cache=artefacts.resolve().with_suffix(".timing")
    )
    log = BuildLog()
    started = time.perf_counter()
    try:
        plan = build_plan(trt, model, settings, log)
        inspection = inspect_plan(trt, plan, log)
    finally:
        (artefacts / BUILD_LOG).write_text(str(log), encoding="utf-8")
    return keep_plan(
        card,
        plan,
        inspection,
        shell("python", "-m", "export.plan.build", "--artefacts", ".", "--target", target_name),
        versions("pycuda") | {"tensorrt": trt.__version__},
        compute_capability=device.compute_capability,
        gpu=device.name,
        profiles=[served.shapes for served in settings.profiles],
        build_s=round(time.perf_counter() - started, 1),
    )


def keep_plan(
    card: Card, plan: bytes, inspection: str, command: str, made_with: Mapping[str, str], **facts: Any
) -> Path:
    """Write a plan and its inspection beside the artefacts that it was built from, and enter it on their card.

    Args:
        card: of the artefacts.
        plan: the serialized plan.
        inspection: what it consists of, see `inspect_plan`.
        command: the command that builds it.
        made_with: versions of the tools.
        **facts: what else the card is to know of it.

    Returns:
        The plan.
    """
    path = card.folder / PLAN_FILE
    for file, content in ((path, plan), (card.folder / INSPECTION, inspection.encode())):
        with atomic_file(file) as aside:
            aside.write_bytes(content)
    write_script(card.folder, HALF_FILE, card.tile_sizes)
    card.record("plan", path, "onnx_fp16", command, versions=made_with, **facts)
    write_card(card)
    return path


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Build a plan from the command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m export.plan.build",
        description="Build the TensorRT plan of exported artefacts, on the machine with the GPU that will run it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    arguments.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder that export/main.py wrote")
    arguments.add_argument("--target", choices=list(TARGETS), default="v100", help="the GPU")
    chosen = arguments.parse_args(argv)
    say(f"built and on the card: {build_into(chosen.artefacts, chosen.target)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
