"""The ranks that train together: Horovod's where it was started by horovodrun, one process elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from train.config import ConfigError
from unet.machine import usable_cores

_LAUNCHER_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")


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

    def sum(self, values: tf.Tensor, name: str) -> tf.Tensor:
        """The element-wise sum of a tensor over all ranks."""
        return self.horovod.allreduce(values, op=self.horovod.Sum, name=name) if self.horovod else values

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


def join_cluster() -> Cluster:
    """Join the ranks that horovodrun or mpirun started, pin this rank's GPU, and share out the CPU's cores.

    Raises:
        ConfigError: if this process was started as one of several ranks but Horovod is not installed.
    """
    cluster = _join_horovod() if any(name in os.environ for name in _LAUNCHER_VARIABLES) else Cluster()
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        local_rank = cluster.horovod.local_rank() if cluster.horovod else 0
        tf.config.set_visible_devices(gpus[local_rank], "GPU")
        tf.config.experimental.set_memory_growth(gpus[local_rank], True)
    tf.config.threading.set_intra_op_parallelism_threads(max(1, usable_cores() // cluster.local_size))
    tf.config.threading.set_inter_op_parallelism_threads(2)
    return cluster


def _join_horovod() -> Cluster:
    try:
        import horovod.tensorflow as hvd
    except ImportError as error:
        raise ConfigError(
            f"this is one of several ranks but Horovod cannot be loaded ({error}): run `make install`, which builds it"
        ) from error
    # Gloo's own 30 s are less than the first rank may take to write a checkpoint or to compile the network.
    os.environ.setdefault("HOROVOD_GLOO_TIMEOUT_SECONDS", "600")
    hvd.init()
    return Cluster(rank=hvd.rank(), size=hvd.size(), local_size=hvd.local_size(), horovod=hvd)
