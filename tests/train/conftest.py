from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from train.config import TrainConfig
from train.input.store import Slice
from unet.phantom import synthetic_stack

MAIN = Path(__file__).resolve().parents[2] / "train" / "main.py"

TINY = ("--base_filters=2", "--tile_size=188", "--optimizer=adam", "--learning_rate=0.001", "--log_every=1")


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic stack, laid out as the trainer wants it."""
    folder = tmp_path_factory.mktemp("phantom")
    images, labels = synthetic_stack(slices=5, size=96, seed=1)
    tifffile.imwrite(folder / "train-volume.tif", images)
    tifffile.imwrite(folder / "train-labels.tif", labels * np.uint8(255))
    tifffile.imwrite(folder / "test-volume.tif", images[:2])
    return folder


@pytest.fixture(scope="session")
def slices() -> list[Slice]:
    images, labels = synthetic_stack(slices=5, size=96, seed=1)
    return [Slice(f"phantom[{index}]", image, label) for index, (image, label) in enumerate(zip(images, labels))]


@pytest.fixture
def tiny(tmp_path: Path, phantom_dir: Path) -> Callable[..., TrainConfig]:
    """Makes configurations of a network that trains in seconds."""

    def make(**changes: object) -> TrainConfig:
        settings: dict[str, object] = {
            "exec_mode": "train",
            "model_dir": str(tmp_path / "result"),
            "data_dir": str(phantom_dir),
            "base_filters": 2,
            "tile_size": 188,
            "max_steps": 4,
            "log_every": 2,
            "optimizer": "adam",
            "learning_rate": 1e-3,
            "validation_share": 0.0,
        }
        return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def fit() -> Callable[..., list[npt.NDArray[Any]]]:
    """Trains on slices in this process and returns the weights."""

    def train(
        config: TrainConfig, training: Sequence[Slice], validation: Sequence[Slice] = ()
    ) -> list[npt.NDArray[Any]]:
        from train.input.split import Data
        from train.loop import TrainingLoop
        from train.run.cluster import Cluster
        from train.run.folder import Run
        from train.run.log import RunLog
        from train.trainer import Trainer

        run, trainer = Run(config.model_dir), Trainer(config, Cluster())
        checkpoints = run.checkpoints(model=trainer.model, optimizer=trainer.optimizer)
        first = checkpoints.restore() if config.resume and checkpoints.names() else 0
        with contextlib.closing(RunLog(config.model_dir, active=True)) as log, run.locked():
            run.write(settings=dataclasses.asdict(config))
            log.rewind(first)
            TrainingLoop(trainer, run, log, Data(list(training), list(validation)), first).run()
        return list(trainer.model.get_weights())

    return train


@pytest.fixture(scope="session")
def line() -> Callable[..., list[str]]:
    """The command line of a configuration, every flag of it."""

    def words(config: TrainConfig) -> list[str]:
        values = dataclasses.asdict(config).items()
        switches = [f"--{name}" if value else f"--no_{name}" for name, value in values if isinstance(value, bool)]
        flags = [f"--{name}={value}" for name, value in values if not isinstance(value, bool)]
        return [sys.executable, str(MAIN), *switches, *flags]

    return words


@pytest.fixture(scope="session")
def main() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the trainer in a process of its own with these flags, and waits for it."""

    def run(*flags: str, **options: Any) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(MAIN), *flags]
        return subprocess.run(words, capture_output=True, text=True, check=False, **options)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, phantom_dir: Path, main: Any) -> Path:
    """The folder of a run that held out fold 4 and had a validation part; tests copy it before they write."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    flags = ["--exec_mode=train_and_evaluate", f"--data_dir={phantom_dir}", f"--model_dir={folder}", *TINY]
    done = main(*flags, "--crossvalidation_idx=4", "--max_steps=6", "--evaluate_every=2", "--seed=3")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder and its bytes."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read
