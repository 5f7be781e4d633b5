from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from train.config import TrainConfig
from train.input.dataset import Slice
from unet.phantom import synthetic_stack


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
    return [
        Slice(f"phantom[{index}]", image, label, np.where(label == 0, 3, 1).astype(np.float32))
        for index, (image, label) in enumerate(zip(images, labels))
    ]


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
        }
        return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]

    return make
