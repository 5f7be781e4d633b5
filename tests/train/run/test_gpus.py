"""What a rank does with the GPUs of its machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tensorflow as tf

from train.errors import TrainError
from train.run import cluster as module
from train.run.cluster import Cluster, join_cluster
from train.run.launcher import Launched


def test_where_a_gpu_computes_every_core_cuts_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Cluster().input_threads == 1
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    monkeypatch.setattr(module, "usable_cores", lambda: 16)
    assert Cluster().input_threads == 16
    assert Cluster(rank=1, size=8, local_size=4).input_threads == 4
    assert Cluster(local_size=32).input_threads == 1


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Cluster(rank=1, size=2, local_size=2, horovod=SimpleNamespace(local_rank=lambda: 1))
    monkeypatch.setattr(module, "launched", lambda _: Launched("horovodrun", 0, 2))
    monkeypatch.setattr(module, "_join_horovod", lambda launcher, started: second)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [kind])
    with pytest.raises(TrainError, match="2 ranks run on this machine, which has 1 GPU: start one rank for each GPU"):
        join_cluster()


@pytest.mark.gpu
@pytest.mark.parametrize(("flags", "precision"), [([], "float32"), (["--use_amp"], "mixed_float16")])
def test_training_runs_on_the_gpu(
    flags: list[str], precision: str, phantom_dir: Path, tmp_path: Path, project_root: Path
) -> None:
    line = [sys.executable, str(project_root / "train" / "main.py"), f"--data_dir={phantom_dir}", *flags]
    line += [f"--model_dir={tmp_path / 'run'}", "--exec_mode=train", "--benchmark", "--augment"]
    line += ["--base_filters=8", "--tile_size=188", "--warmup_steps=5", "--max_steps=15"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{precision}: " in done.stdout
