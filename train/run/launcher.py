"""What started this process as one of several ranks; known before TensorFlow and Horovod are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# By launcher: what it calls a process's number and the number of processes. Hydra (MPICH, Intel MPI) sets PMI's names.
# Slurm sets its own for a batch script too, which is one process: only its steps count.
_LAUNCHERS = (
    ("horovodrun", "HOROVOD_RANK", "HOROVOD_SIZE"),
    ("OpenMPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("MPICH's Hydra", "PMI_RANK", "PMI_SIZE"),
    ("PMIx", "PMIX_RANK", "PMIX_SIZE"),
    ("Slurm's srun", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


@dataclass(frozen=True)
class Launched:
    """How a process was started.

    Attributes:
        by: the launcher, "" for none.
        rank: number of this process, from 0 on.
        size: how many processes the launcher says that it started.
    """

    by: str = ""
    rank: int = 0
    size: int = 1


def launched(environment: Mapping[str, str]) -> Launched:
    """How the process with this environment was started."""
    for launcher, rank, size in _LAUNCHERS:
        if rank in environment and (launcher == "horovodrun" or environment.get(size, "").isdigit()):
            return Launched(launcher, int(environment[rank]), int(environment.get(size, "1")))
    return Launched()


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all ranks."""
    return launched(os.environ).rank == 0
