"""The kinds of GPU that a TensorRT plan can be built for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A kind of GPU.

    Attributes:
        compute_capability: of the GPU, "MAJOR.MINOR".
        oldest: the oldest release of TensorRT that this project builds with, (major, minor).
        newest: the newest release that supports the GPU, None where no end is known.
    """

    compute_capability: str
    oldest: tuple[int, int] = (8, 6)
    newest: tuple[int, int] | None = None


# Compute capabilities: NVIDIA's list of CUDA GPUs. TensorRT 10.5 dropped Volta (its release notes).
TARGETS = {
    "v100": Target("7.0", newest=(10, 4)),
    "t4": Target("7.5"),
    "a100": Target("8.0"),
    "a10": Target("8.6"),
    "l4": Target("8.9"),
    "h100": Target("9.0"),
}
