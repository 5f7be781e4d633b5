"""A small trained-looking network, exported once for all tests of the room."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.gate.tiles import Source, Tiles, gather_tiles
from tests.cards import rewrite_record
from unet.volume import StackWriter

SIZES = (204, 220)


def write_random_saved_model(path: Path, base_filters: int = 2, *, poison: float | None = None) -> None:
    """A SavedModel with random biases, and logits as far apart as a trained network's.

    Random initial weights alone give probabilities all near 0.5, and zero biases are optimised away.
    """
    from train.model.network import build_unet
    from train.model.saved_model import write_saved_model

    model = build_unet(base_filters=base_filters)
    rng = np.random.default_rng(0)
    weights = [w + rng.normal(0, 0.1, w.shape).astype(np.float32) if w.ndim == 1 else w for w in model.get_weights()]
    weights[-2] = weights[-2] * 8
    if poison is not None:
        weights[0][0, 0, 0, 0] = poison
    model.set_weights(weights)
    with pytest.MonkeyPatch.context() as patch:
        # The trainer refuses such weights; a SavedModel from elsewhere may have them.
        patch.setattr("train.model.saved_model.diverged", lambda variables: "")
        write_saved_model(model, path)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small synthetic stack."""
    from unet.phantom import synthetic_stack

    folder = tmp_path_factory.mktemp("data")
    with StackWriter(folder / "train-volume.tif", None, np.uint8) as writer:
        for page in synthetic_stack(slices=4, size=96, seed=3)[0]:
            writer.append(page)
    return folder


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training run leaves: config.json and saved_model."""
    folder = tmp_path_factory.mktemp("result")
    write_random_saved_model(folder / "saved_model")
    rewrite_record(
        folder,
        settings={"base_filters": 2},
        repeat="python train/main.py --config config.json",
        held_out={"train-volume.tif": [1, 3]},
        trained={"threshold": 0.6, "threshold_from": "validation"},
        versions={"tensorflow": "2.15.1"},
    )
    return folder


@pytest.fixture(scope="session")
def single(model_dir: Path) -> Any:
    """The float32 graph. Tests that change it take a copy."""
    from export.steps.to_onnx import convert

    return convert(model_dir / "saved_model")


@pytest.fixture(scope="session")
def half(single: Any) -> Any:
    """The float16 graph. Tests that change it take a copy."""
    from export.steps.half_precision import to_half

    return to_half(single)


@pytest.fixture(scope="session")
def tiles(data_dir: Path) -> Tiles:
    """Three tiles of 204 and one of 220."""
    return gather_tiles(Source(data_dir), SIZES)


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Any:
    """The SavedModel, run by TensorFlow."""
    from export.steps.reference import Reference

    return Reference(model_dir / "saved_model")


@pytest.fixture(scope="session")
def change_constant() -> Callable[[Any, str, Callable[[Any], Any]], None]:
    """A function that replaces one of a graph's constants by a function of it."""

    def change(model: Any, name: str, function: Callable[[Any], Any]) -> None:
        from onnx import numpy_helper

        found = [initializer for initializer in model.graph.initializer if initializer.name == name]
        value = np.asarray(function(numpy_helper.to_array(found[0]).copy()))
        found[0].CopyFrom(numpy_helper.from_array(value, name))

    return change


@pytest.fixture(scope="session")
def random_saved_model() -> Callable[..., None]:
    """``write_random_saved_model``."""
    return write_random_saved_model
