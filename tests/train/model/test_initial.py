"""Starting from a trained network: its folder, a checkpoint of it, its SavedModel, or what was exported from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from train.config import config_of
from train.errors import TrainError
from train.model.initial import load_initial
from train.model.network import build_unet
from train.run.folder import Run


@pytest.mark.parametrize("part", [".", "best/step-*", "saved_model", "artefacts"])
def test_every_form_of_a_network_gives_the_same_weights(part: str, trained: Path, tmp_path: Path) -> None:
    if part == "artefacts":  # the exporter copies the SavedModel under the same name beside its card
        shutil.copytree(trained / "saved_model", tmp_path / "artefacts" / "saved_model")
        source = tmp_path / "artefacts"
    else:
        (source,) = trained.glob(part) if "*" in part else [trained / part]
    expected, model = build_unet(2), build_unet(2, seed=9, precision="mixed_bfloat16")
    Run(trained).best(expected).restore(partial=True)
    load_initial(source, model)
    for left, right in zip(model.get_weights(), expected.get_weights()):
        np.testing.assert_array_equal(left, right)


def test_another_number_of_filters_is_refused_in_words(trained: Path) -> None:
    for source in (trained, trained / "saved_model"):
        with pytest.raises(TrainError, match="has 2 filters in its first level, but --base_filters is 4: add --base_f"):
            load_initial(source, build_unet(4))


def test_another_number_of_classes_is_refused_in_words(tmp_path: Path) -> None:
    three = build_unet(2)
    body = tf.keras.Model(three.input, tf.keras.layers.Conv2D(3, 1, name="logits3")(three.layers[-2].output))
    run = Run(tmp_path)
    run.checkpoints(model=body).save(1)
    with pytest.raises(TrainError, match="tells 3 classes apart, but this network tells 2"):
        load_initial(tmp_path, build_unet(2))


def test_what_is_no_network_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="is no trained network: name a run's --model_dir"):
        load_initial(tmp_path, build_unet(2))
    (tmp_path / "saved_model.pb").write_bytes(b"nothing")
    with pytest.raises(TrainError, match="is not a SavedModel of this trainer"):
        load_initial(tmp_path, build_unet(2))


def test_fine_tuning_takes_smaller_steps_unless_told_otherwise() -> None:
    assert config_of({"init_from": "x"}).learning_rate == pytest.approx(0.001)
    assert config_of({"init_from": "x", "learning_rate": 0.5}).learning_rate == 0.5
    assert config_of({}).learning_rate == 0.01


def test_a_run_starts_from_it(trained: Path, phantom_dir: Path, tmp_path: Path, main: Callable[..., object]) -> None:
    done = main(
        *("--exec_mode=train", f"--data_dir={phantom_dir}", f"--model_dir={tmp_path / 'run'}", "--tile_size=188"),
        *(f"--init_from={trained}", "--base_filters=2", "--max_steps=1", "--train_part=decoder"),
    )
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    source, tuned = build_unet(2), build_unet(2)
    Run(trained).best(source).restore(partial=True)
    Run(tmp_path / "run").checkpoints(model=tuned).restore(partial=True)
    for layer in source.layers:
        for old, new in zip(layer.get_weights(), tuned.get_layer(layer.name).get_weights()):
            assert np.abs(new - old).max() < 0.01
            if layer.name.startswith("down"):
                np.testing.assert_array_equal(new, old)
