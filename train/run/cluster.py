"""The ranks that train together: Horovod's where a launcher started several, one process elsewhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import tensorflow as tf

from train.errors import TrainError
from train.run.launcher import launched
from unet.errors import EXIT_USER_ERROR, UnetError
from unet.machine import usable_cores

if TYPE_CHECKING:
    import numpy.typing as npt

Found = TypeVar("Found")


@dataclass(frozen=True)
class Cluster:
    """This process among all. ``horovod`` is the module `horovod.tensorflow`, or None for a single process."""

    rank: int = 0
    size: int = 1
    local_size: int = 1
    horovod: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes files and lines."""
        return self.rank == 0

    @property
    def input_threads(self) -> int:
        """Threads that cut this rank's windows: its share of the cores where a GPU computes, else one beside them.

        One thread cuts less than 200 windows a second, which a large GPU is through with sooner.
        """
        return cores_of(self) if tf.config.list_physical_devices("GPU") else 1

    def sum(self, values: tf.Tensor, name: str) -> tf.Tensor:
        """The element-wise sum of a tensor over all ranks."""
        return self.horovod.allreduce(values, op=self.horovod.Sum, name=name) if self.horovod else values

    def gather(self, values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        """The rows of all ranks, rank after rank: float64 [N, ...] of each rank to [ranks x N, ...]."""
        return np.asarray(self.horovod.allgather(tf.constant(values), name=name)) if self.horovod else values

    def average_gradients(self, tape: tf.GradientTape, *, fp16_compression: bool) -> Any:
        """A tape whose gradients are averaged over all ranks."""
        if not self.horovod:
            return tape
        compression = self.horovod.Compression.fp16 if fp16_compression else self.horovod.Compression.none
        return self.horovod.DistributedGradientTape(tape, compression=compression)

    def broadcast(self, variables: list[tf.Variable]) -> None:
        """Give every rank the first rank's values."""
        if self.horovod:
            self.horovod.broadcast_variables(variables, root_rank=0)

    def from_first(self, decide: Callable[[], Found]) -> Found:
        """What ``decide`` returns on the first rank, which alone calls it: one look at the disk counts for all.

        Raises:
            UnetError: on the first rank, if ``decide`` raises it.
            SystemExit: then on the others, which have nothing to add to its sentence.
        """
        if not self.horovod:
            return decide()
        error: Exception | None = None
        answer: Found | None = None
        if self.is_first:
            try:
                answer = decide()
            except (UnetError, OSError) as caught:
                error = caught
        done, answer = self.horovod.broadcast_object((error is None, answer), root_rank=0)
        if error is not None:
            raise error
        if not done:
            raise SystemExit(EXIT_USER_ERROR)
        return answer  # type: ignore[return-value]


def join_cluster() -> Cluster:
    """Join the ranks that a launcher started, pin this rank's GPU, and share out the CPU's cores.

    Raises:
        TrainError: if this is one of several ranks but Horovod is not installed, or does not find the others; or there
            are fewer GPUs than ranks.
    """
    start = launched(os.environ)
    cluster = _join_horovod(start.by, start.size) if start.by else Cluster()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        local_rank = cluster.horovod.local_rank() if cluster.horovod else 0
        if local_rank >= len(gpus):
            raise TrainError(
                f"{cluster.local_size} ranks run on this machine, which has {len(gpus)} GPU{'s' * (len(gpus) > 1)}: "
                "start one rank for each GPU"
            )
        tf.config.set_visible_devices(gpus[local_rank], "GPU")
        tf.config.experimental.set_memory_growth(gpus[local_rank], True)
    tf.config.threading.set_intra_op_parallelism_threads(cores_of(cluster))
    tf.config.threading.set_inter_op_parallelism_threads(2)
    return cluster


def cores_of(cluster: Cluster) -> int:
    """This rank's share of the machine's cores, at least one."""
    return max(1, usable_cores() // cluster.local_size)


def _join_horovod(launcher: str, started: int) -> Cluster:
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise TrainError(
            f"this is one of several ranks but Horovod cannot be loaded ({error}): run `make install`, which builds it"
        ) from error
    # Gloo's own 30 s are less than the first rank may take to write a checkpoint or to compile the network.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "600")
    hvd.init()
    if hvd.size() != started:
        found = "only itself" if hvd.size() == 1 else f"{hvd.size()} ranks"
        built = "" if hvd.mpi_built() else ", which is built without MPI,"
        raise TrainError(
            f"{launcher} started {started} processes, but Horovod{built} finds {found}: each would train alone and "
            f"write into the same folder; start them with `horovodrun -np {started} --gloo python train/main.py "
            f"{' '.join(sys.argv[1:])}`"
        )
    return Cluster(rank=hvd.rank(), size=hvd.size(), local_size=hvd.local_size(), horovod=hvd)
