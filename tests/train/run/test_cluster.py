from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from train.run.launcher import Launched, is_first_rank, launched

TWO_RANKS = """
import sys, tensorflow as tf
from train.config import TrainConfig
from train.errors import TrainError
from train.run.cluster import join_cluster
from train.trainer import make_optimizer, state_of

cluster = join_cluster()
optimizer = make_optimizer(TrainConfig(), "mixed_float16")
optimizer.build([tf.Variable([1.0])])
optimizer._loss_scale.current_loss_scale.assign(1024.0 * (1 + cluster.rank))
cluster.broadcast(state_of(optimizer))
print("scale", float(optimizer.loss_scale), flush=True)
print("told", cluster.from_first(lambda: cluster.rank + 7), flush=True)

def refuse():
    raise TrainError("no")

try:
    cluster.from_first(refuse)
except TrainError:
    print("said", cluster.rank, flush=True)
except SystemExit as left:
    print("left", cluster.rank, left.code, flush=True)
"""


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, Launched()),
        ({"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "OMPI_COMM_WORLD_SIZE": "3"}, Launched("horovodrun", 0, 2)),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, Launched("OpenMPI", 1, 2)),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, Launched("MPICH's Hydra", 3, 4)),
        ({"SLURM_PROCID": "7", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8"}, Launched("Slurm's srun", 7, 8)),
        # A shell inside an allocation is one process, whatever the allocation is for.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Launched()),
    ],
)
def test_launchers_say_how_many_they_started(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: Launched
) -> None:
    assert launched(variables) == expected
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    # Under any launcher one rank speaks for all.
    assert is_first_rank() == (expected.rank == 0)


@pytest.mark.parametrize(
    "variables",
    [
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
        {"PMI_RANK": "0", "PMI_SIZE": "2"},
    ],
)
def test_ranks_that_do_not_meet_are_refused(
    variables: dict[str, str], phantom_dir: Path, tmp_path: Path, project_root: Path
) -> None:
    """As under another launcher with a Horovod that has Gloo alone: each would train alone in the same folder."""
    line = [sys.executable, str(project_root / "train" / "main.py"), f"--model_dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [*line, f"--data_dir={phantom_dir}", "--exec_mode=train", "--base_filters=2", "--tile_size=188"],
        env={**os.environ, **variables}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert "started 2 processes, but Horovod, which is built without MPI, finds only itself" in done.stderr
    assert "`horovodrun -np 2 --gloo python train/main.py" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_first_rank_decides_and_gives_its_loss_scale(tmp_path: Path, project_root: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    horovodrun = str(Path(sys.executable).parent / "horovodrun")
    done = subprocess.run(
        [horovodrun, "-np", "2", "--gloo", sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(project_root)}, capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    said = done.stdout
    assert said.count("scale 1024.0") == 2, said + done.stderr
    assert said.count("told 7") == 2
    assert said.count("said 0") == 1
    assert said.count("left 1 2") == 1
