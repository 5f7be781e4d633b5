"""How Triton runs a model: the profiles, their settings, and the configuration as Triton's own protobuf message."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serve.models.backend import AUTO, BACKEND_CODE_FILE, BACKENDS, ENGINE_FILE, PYTHON_BACKEND, cpu_backend
from serve.models.errors import RepositoryError as RepositoryError
from serve.models.plan_fit import check_plan
from unet.card import CARD_FILE, Card, CardError
from unet.card.records import gpu_device
from unet.config import setting
from unet.engine.cpu import EngineChoice
from unet.engine.memory import bytes_per_pixel, largest_tile, total_memory
from unet.files import sha256_of
from unet.geometry import is_valid_size, output_size
from unet.machine import numa_nodes
from unet.names import INPUT, OUTPUT, PLAN_FILE
from unet.volume.metadata import typical_pixel_nm

if TYPE_CHECKING:
    from pathlib import Path

CONFIG_FILE = "config.pbtxt"
_FIRST_FILES = {"tensorrt": PLAN_FILE, PYTHON_BACKEND: BACKEND_CODE_FILE}


@dataclass(frozen=True)
class Profile:
    """A kind of machine that serves.

    Attributes:
        on_gpu: whether the network runs on an NVIDIA GPU, as a TensorRT plan.
        max_queue_delay_us: the default, in microseconds; see docs/serving.md for how it was chosen.
        compute_capability: of the one GPU that it is for; empty for any.
    """

    on_gpu: bool
    max_queue_delay_us: int
    compute_capability: str = ""


PROFILES = {
    # On a CPU an image costs as much in a shared pass as alone: no wait pays.
    "cpu": Profile(on_gpu=False, max_queue_delay_us=0),
    # A guess until it is measured: a thirtieth of what a pass of one tile takes on a V100.
    "v100": Profile(on_gpu=True, max_queue_delay_us=500, compute_capability="7.0"),
    "gpu": Profile(on_gpu=True, max_queue_delay_us=500),
}


@dataclass(frozen=True)
class ModelSettings:
    """How Triton runs a model.

    Attributes:
        name: the model's name.
        profile: "cpu", "v100" or "gpu": the machine that serves.
        backend: what runs the CPU engine: "openvino" is our own, in the server's process, "python" Triton's python
            backend, which runs ONNX Runtime too; "auto" takes our own where it is built and the engine is OpenVINO's.
        max_batch_size: most tiles in one pass of the engine.
        max_tile_size: largest side of a tile that the server takes, in pixels, 188 + 16k. 0 takes the largest of which
            a pass fits half of the memory of the machine that publishes. On a GPU the plan decides.
        max_queue_delay_us: how long a request waits for others to share its pass, in microseconds; None takes the
            profile's.
        preferred_batch_sizes: sizes of a pass that are worth waiting for; only where the plan is faster at them.
        max_queue_size: requests that may wait, more are refused at once; 0 sets no limit.
        default_timeout_us: how long a request may wait in the queue, in microseconds, unless it asks for another time;
            0 sets no limit.
        priority_levels: 1 is served first; 0 makes no difference between requests. With any of these three Triton 2.50
            stops preparing the next pass while an instance is at work, and with one instance some requests then wait
            half a second: see ``queue_policy`` and docs/serving.md.
        instances: copies of the network on each GPU, or in all on a CPU; 0 decides by the machine that publishes.
        threads: that each copy computes with on a CPU; 0 shares out the cores of the machine that serves, see
            ``core_shares``.
        response_cache: whether answers are kept for requests that come again; the server must be given room for them.
    """

    name: str = setting("unet", "the model's name", flag="model_name")
    profile: str = setting("cpu", "machine that serves", choices=tuple(PROFILES))
    backend: str = setting(AUTO, "what runs the CPU engine", choices=BACKENDS)
    max_batch_size: int = setting(16, "most tiles in one pass")
    max_tile_size: int = setting(0, "largest side of a tile, 188 + 16k; 0: by the memory of this machine")
    max_queue_delay_us: int | None = setting(None, "wait for others to share a pass; None: the profile's", kind=int)
    preferred_batch_sizes: tuple[int, ...] = setting((), "of a pass that are worth the wait", kind=int)
    max_queue_size: int = setting(0, "requests that may wait; 0: any")
    default_timeout_us: int = setting(0, "longest wait in the queue; 0: any")
    priority_levels: int = setting(0, "1 goes first; 0: none does")
    instances: int = setting(0, "copies of the network; 0: by the machine")
    threads: int = setting(0, "threads of each copy; 0 shares out the cores")
    response_cache: bool = setting(False, "keep answers; see --response_cache_mib of serve/triton.py")

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise RepositoryError(f"the profile {self.profile} is unknown; there are {', '.join(PROFILES)}")
        if self.backend not in BACKENDS:
            raise RepositoryError(f"the backend {self.backend} is unknown; there are {', '.join(BACKENDS)}")
        least = {"max_batch_size": 1, "max_queue_size": 0, "default_timeout_us": 0, "priority_levels": 0}
        for name, limit in {**least, "instances": 0, "threads": 0}.items():
            if not limit <= getattr(self, name) < 2**31:
                raise RepositoryError(f"{name} is {getattr(self, name)}; it must be at least {limit}, and below 2^31")
        if self.max_queue_delay_us is not None and not 0 <= self.max_queue_delay_us < 2**31:
            raise RepositoryError(f"max_queue_delay_us is {self.max_queue_delay_us}; it must be 0 to 2^31 - 1")
        for size in self.preferred_batch_sizes:
            if not 1 <= size <= self.max_batch_size:
                raise RepositoryError(
                    f"preferred_batch_sizes has {size}; they go from 1 to the max_batch_size, {self.max_batch_size}"
                )
        if self.max_tile_size and not is_valid_size(self.max_tile_size):
            raise RepositoryError(f"max_tile_size is {self.max_tile_size}; it must be 188 + 16k, or 0")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise RepositoryError(f"the model name {self.name!r} must consist of letters, digits, -, _ and .")

    @property
    def machine(self) -> Profile:
        """The profile itself."""
        return PROFILES[self.profile]

    @property
    def queue_delay_us(self) -> int:
        """The delay that counts, in microseconds."""
        return self.machine.max_queue_delay_us if self.max_queue_delay_us is None else self.max_queue_delay_us

    @property
    def queue_policy(self) -> bool:
        """Whether requests are limited, timed or ranked while they wait."""
        return bool(self.max_queue_size or self.default_timeout_us or self.priority_levels)

    @property
    def instance_count(self) -> int:
        """Copies of the network, decided if it was left open.

        On a CPU one for each memory node: one copy on all cores of a node answers a lone request soonest. On a GPU two,
        so that one copies while the other computes. With a queue policy at least two, since only a free instance makes
        Triton's batcher look at a request at once.
        """
        if self.instances:
            return self.instances
        return max(2 if self.machine.on_gpu else numa_nodes(), 2 if self.queue_policy else 1)

    @property
    def core_shares(self) -> int:
        """Instances that the cores of a CPU are shared out among.

        The one that a queue policy adds is there to be idle, and takes no cores from a lone request.
        """
        return self.instances or numa_nodes()


def engine_file(card: Card, settings: ModelSettings) -> Path:
    """The proven file that a profile serves: what the card's CPU engine loads, or the plan.

    Raises:
        CardError: it is missing, not what the card says, or the card has none for this profile.
        RepositoryError: the server cannot run the plan as it is to be published.
    """
    if not settings.machine.on_gpu:
        return card.verify_engine()
    for name, artefact in card.artefacts.items():
        if artefact.file == PLAN_FILE:
            capability = settings.machine.compute_capability
            path = card.folder / PLAN_FILE
            check_plan(path, artefact, capability, settings.max_batch_size, settings.instance_count)
            return card.verify_proven(name, gpu_device(str(artefact.facts["compute_capability"])))
    raise CardError(
        f"{card.folder / CARD_FILE} lists no {PLAN_FILE}, which the profile {settings.profile} serves: build the plan "
        "on the machine with the GPU first, or publish with --profile cpu"
    )


def model_config(card: Card, settings: ModelSettings) -> Any:
    """The model's configuration as Triton's own message, ``inference.ModelConfig``.

    Raises:
        CardError: the card names no engine for this profile.
        UnetError: the network cannot take a tile size on the card.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    machine = settings.machine
    backend = "tensorrt" if machine.on_gpu else cpu_backend(card, settings.backend)[0]
    group = pb.ModelInstanceGroup(
        kind=pb.ModelInstanceGroup.KIND_GPU if machine.on_gpu else pb.ModelInstanceGroup.KIND_CPU,
        count=settings.instance_count,
        # The plan has one optimization profile for each tile size.
        profile=[str(index) for index in range(len(card.tile_sizes))] if machine.on_gpu else [],
    )
    config = pb.ModelConfig(
        name=settings.name,
        backend=backend,
        default_model_filename=_FIRST_FILES.get(backend, ENGINE_FILE),
        max_batch_size=settings.max_batch_size,
        input=[pb.ModelInput(name=INPUT, data_type=pb.TYPE_UINT8, dims=[1, -1, -1])],
        output=[pb.ModelOutput(name=OUTPUT, data_type=pb.TYPE_FP16, dims=[1, -1, -1])],
        instance_group=[group],
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
    )
    if settings.response_cache:
        config.response_cache.enable = True
    _set_batching(config.dynamic_batching, settings)
    _add_warmups(config, card, settings)
    parameters = {
        **about_version(card),
        "max_tile_size": str(_max_tile_size(card, settings)),
        "profile": settings.profile,
    }
    if not machine.on_gpu:
        parameters["engine"] = f"{card.engine.kind} {card.engine.precision}"
        parameters["threads"] = str(settings.threads)
        parameters["core_shares"] = str(settings.core_shares)
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return config


def about_version(card: Card) -> dict[str, str]:
    """What a client must know of the one version that a card belongs to, by the names of the parameters that say it."""
    known = {
        "tile_sizes": ",".join(str(size) for size in card.tile_sizes),
        "card_sha256": sha256_of(card.folder / CARD_FILE),
    }
    if (size := typical_pixel_nm(card.model.get("pixel_size_nm", {}).values())) is not None:
        known["pixel_size_nm"] = f"{size:.6g}"
    if (threshold := card.model.get("threshold")) is not None:
        known["threshold"] = repr(float(threshold))
    return known


def _max_tile_size(card: Card, settings: ModelSettings) -> int:
    largest = max(card.tile_sizes)
    if settings.machine.on_gpu:
        return largest
    if settings.max_tile_size and settings.max_tile_size < largest:
        raise RepositoryError(
            f"max_tile_size is {settings.max_tile_size}, and the artefacts are for tiles of up to {largest}: raise it, "
            "or export with other --tile_sizes"
        )
    pixel_bytes = bytes_per_pixel(EngineChoice(card.engine.kind, card.engine.precision), card.model.get("base_filters"))
    # What was exported and measured is taken in any case.
    return settings.max_tile_size or max(largest, largest_tile(total_memory() // settings.instance_count, pixel_bytes))


def _set_batching(batching: Any, settings: ModelSettings) -> None:
    batching.max_queue_delay_microseconds = settings.queue_delay_us
    batching.preferred_batch_size.extend(sorted(set(settings.preferred_batch_sizes)))
    if settings.max_queue_size or settings.default_timeout_us:
        policy = batching.default_queue_policy
        policy.max_queue_size = settings.max_queue_size
        policy.default_timeout_microseconds = settings.default_timeout_us
        policy.allow_timeout_override = True
    if settings.priority_levels:
        batching.priority_levels = settings.priority_levels
        batching.default_priority_level = (settings.priority_levels + 1) // 2


def _add_warmups(config: Any, card: Card, settings: ModelSettings) -> None:
    """Noise of every size: the first real request must not pay for what an engine sets up at its first pass.

    On a GPU also the largest batch, for which TensorRT sets aside its memory.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    for size in card.tile_sizes:
        output_size(size)
        for batch_size in sorted({1, settings.max_batch_size}) if settings.machine.on_gpu else [1]:
            warmup = config.model_warmup.add(name=f"tile_{size}_batch_{batch_size}", batch_size=batch_size)
            image = warmup.inputs[INPUT]
            image.data_type, image.random_data = pb.TYPE_UINT8, True
            image.dims.extend([1, size, size])
