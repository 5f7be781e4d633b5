"""How a plan is built, whether by TensorRT's Python API or by trtexec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.errors import ExportError
from unet.engine.targets import same_release
from unet.names import INPUT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from unet.engine.targets import Target

BATCHES = (1, 8, 16)
_GIB = 1 << 30


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
        workspace_bytes: most scratch memory that a layer may take on the GPU; every execution context has its own. At
            64 filters a batch of 16 tiles of 700 needs 1.1 GiB, as TensorRT-RTX says when it gets less.
        optimization_level: 0 to 5, how long TensorRT looks for faster kernels.
        timing_cache: file that keeps measured kernels from one build to the next; None for none.
        compute_capabilities: GPUs to build for, where the library builds for others than the present one.
    """

    profiles: tuple[Profile, ...]
    workspace_bytes: int = 2 * _GIB
    optimization_level: int = 5
    timing_cache: Path | None = None
    compute_capabilities: tuple[str, ...] = ()

    @classmethod
    def of(cls, tile_sizes: Sequence[int], timing_cache: Path | None = None) -> BuildSettings:
        """One profile for each tile size."""
        return cls(tuple(Profile(size) for size in tile_sizes), timing_cache=timing_cache)


def check_target(target: Target, version: str, compute_capability: str) -> None:
    """Refuse a TensorRT or a GPU that a target's plan cannot be built with.

    Raises:
        ExportError: naming both sides.
    """
    if not same_release(version, target.tensorrt):
        raise ExportError(
            f"TensorRT {version} builds plans that Triton {target.triton} cannot load, which has {target.tensorrt}: "
            f"install tensorrt=={target.tensorrt}, or build in the container tensorrt:{target.triton}-py3"
        )
    if compute_capability != target.compute_capability:
        raise ExportError(
            f"this GPU has compute capability {compute_capability}, the target {target.name} has "
            f"{target.compute_capability}: build on the machine that serves, or name its --target"
        )
