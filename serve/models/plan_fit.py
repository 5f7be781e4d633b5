"""Whether a TensorRT plan can be served as it is to be published: its GPU, its TensorRT, its batches, its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.models.errors import RepositoryError
from unet.engine.targets import same_release, target_of

if TYPE_CHECKING:
    from pathlib import Path

    from unet.card.records import Artefact

_GIB = 1 << 30
# Of a GPU's memory, for what CUDA, Triton and its transfers take themselves.
_FREE_SHARE = 0.1


def check_plan(path: Path, plan: Artefact, profile_capability: str, max_batch_size: int, instances: int) -> None:
    """Refuse a plan that the server could not load, or not run in the batches that it is configured for.

    Args:
        path: the plan, for messages.
        plan: what the card knows of it.
        profile_capability: the compute capability that the profile is for; empty for any.
        max_batch_size: of the configuration.
        instances: copies of the network on the GPU.

    Raises:
        RepositoryError: naming both sides.
    """
    built = str(plan.facts.get("compute_capability", "an unknown one"))
    if profile_capability and built != profile_capability:
        raise RepositoryError(
            f"{path} was built for compute capability {built}, the profile is for {profile_capability}: build it "
            "there, or publish it with --profile gpu"
        )
    target = target_of(built)
    if target is None:
        raise RepositoryError(
            f"{path} was built for compute capability {built}, which no Triton of this project serves"
        )
    release = plan.versions.get("tensorrt", "an unknown release")
    if not same_release(release, target.tensorrt):
        raise RepositoryError(
            f"{path} was built by TensorRT {release}, Triton {target.triton} which serves it has {target.tensorrt}: "
            "build it with that"
        )
    largest = int(plan.facts["max_batch_size"])
    if max_batch_size > largest:
        raise RepositoryError(
            f"max_batch_size is {max_batch_size}, the plan takes batches of at most {largest}: "
            f"publish with --max_batch_size {largest}"
        )
    contexts, needed = served_bytes(plan, instances)
    if needed > (1 - _FREE_SHARE) * target.memory_gib * _GIB:
        raise RepositoryError(
            f"{path} takes {needed / _GIB:.1f} GiB in {contexts} execution contexts, {instances} instances of "
            f"{len(plan.facts['profiles'])} profiles, and a GPU of the kind {target.name} has {target.memory_gib} GiB: "
            "publish with fewer --instances, or export with fewer --tile_sizes"
        )


def served_bytes(plan: Artefact, instances: int) -> tuple[int, int]:
    """Execution contexts that Triton makes of a plan, one for each profile and instance, and bytes that all take.

    The contexts share the weights.
    """
    contexts = instances * len(plan.facts["profiles"])
    return contexts, contexts * int(plan.facts["context_bytes"]) + int(plan.facts["weight_bytes"])
