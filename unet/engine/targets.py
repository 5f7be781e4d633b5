"""Which GPU is served how: the one table of compute capability, TensorRT, Triton, profile and memory.

Export, publishing, doctor and docs read it. A plan runs only in the TensorRT that built it, so the release of Triton
that serves decides which TensorRT builds.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of NVIDIA's container tritonserver:24.09-py3, the last that serves a Volta; TensorRT 10.5 dropped it.
TRITON, TENSORRT = "24.09", "10.4.0"


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
