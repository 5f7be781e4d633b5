"""Which GPU is served how, and which versions belong together: TensorFlow, Triton, TensorRT, CUDA, compute capability.

Export, publishing, doctor, docs, images and pins have these versions; ``tests/unet/engine/test_targets.py`` compares
them. A plan runs only in the TensorRT that built it, so the release of Triton
that serves decides which TensorRT builds.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of NVIDIA's container tritonserver:24.09-py3, the last that serves a Volta; TensorRT 10.5 dropped it.
TRITON, TENSORRT = "24.09", "10.4.0"
# The server and its client in that container and in the wheel nvidia-pytriton.
TRITON_SERVER = "2.50.0"
TENSORFLOW, TENSORFLOW_CUDA = "2.15.1", "12.2"
TENSORRT_RTX = "1.7.1.116"
# NVIDIA's, for that CUDA; data-center GPUs run the container's CUDA with it too.
LEAST_DRIVER = 535


@dataclass(frozen=True)
class Part:
    """A part of the stack, as the docs show it.

    Attributes:
        name: the part, and what it is for.
        version: the one that is used, or the first that would be.
        cuda: that it brings along or needs.
        compute_capability: of the GPUs that it is for.
        known_from: where that is known from, and whether it was run.
    """

    name: str
    version: str
    cuda: str
    compute_capability: str
    known_from: str


PARTS = (
    Part(
        "TensorFlow: training, export",
        TENSORFLOW,
        f"{TENSORFLOW_CUDA}, cuDNN 8",
        "has kernels for 7.0; compiles those for 9.0 when it starts",
        "7.0: the wheel; 9.0: run on an H100",
    ),
    Part(
        "Triton: serving",
        f"{TRITON}, which is {TRITON_SERVER}",
        "12.6",
        "7.0 and newer",
        "NVIDIA's compatibility page; the wheel's server was run on CPUs, the container was not run",
    ),
    Part("TensorRT in it", TENSORRT, "12.6", "7.0 and newer", "NVIDIA's release notes; not run"),
    Part(
        "any newer Triton, whose TensorRT is 10.5 or newer",
        "24.10",
        "12.6 and newer",
        "7.5 and newer, for plans",
        "TensorRT's release notes, 10.5 removed 7.0; not run. NVIDIA's page on 24.10 still says 6.0 for the container",
    ),
    Part(
        "TensorRT-RTX: checks of the graph without a GPU",
        TENSORRT_RTX,
        "12",
        "7.5 to 12.1, without 9.0",
        "its builder was run; an H100 was refused",
    ),
)


@dataclass(frozen=True)
class Target:
    """A kind of GPU that plans are built for and served on.

    Attributes:
        name: what flags call it.
        compute_capability: "MAJOR.MINOR", of NVIDIA's list of CUDA GPUs.
        memory_gib: of the smallest GPU of the kind.
        profile: that publishes for it, see serve/models/config.py.
        tensorrt: the release that builds, "MAJOR.MINOR.PATCH".
        triton: the release that serves.
    """

    name: str
    compute_capability: str
    memory_gib: int
    profile: str = "gpu"
    tensorrt: str = TENSORRT
    triton: str = TRITON


TARGETS = {
    one.name: one
    for one in (
        Target("v100", "7.0", 16, profile="v100"),
        Target("t4", "7.5", 16),
        Target("a100", "8.0", 40),
        Target("a10", "8.6", 24),
        Target("l4", "8.9", 24),
        Target("h100", "9.0", 80),
    )
}


def target_of(compute_capability: str) -> Target | None:
    """The kind of GPU of a compute capability; None where the table has none."""
    return next((one for one in TARGETS.values() if one.compute_capability == compute_capability), None)


def same_release(one: str, other: str) -> bool:
    """Whether two versions of TensorRT, as in "10.4.0.26", are of one release, as in 10.4.0."""
    return one.split(".")[:3] == other.split(".")[:3]
