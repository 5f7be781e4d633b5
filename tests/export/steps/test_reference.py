from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.gate.tiles import Tiles
from export.steps.reference import Outputs, main, parameter_count

STATE = """
import os
from export.steps.reference import import_tensorflow
tf = import_tensorflow()
from tensorflow.python.framework import config
print(config.is_op_determinism_enabled(), tf.config.get_visible_devices("GPU"), os.environ["CUDA_VISIBLE_DEVICES"])
"""


def test_it_runs_on_the_cpu_and_is_deterministic() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run([sys.executable, "-c", STATE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True [] -1"]


def test_logits_are_computed_of_as_many_batches_as_asked(model_dir: Path, tiles: Tiles, tmp_path: Path) -> None:
    np.savez(tmp_path / "tiles.npz", *tiles.batches)
    words = [str(model_dir / "saved_model"), str(tmp_path / "tiles.npz"), "1", str(tmp_path / "outputs.npz")]
    assert main(words) == 0
    found = Outputs.read(tmp_path / "outputs.npz")
    assert [one.shape[0] for one in found.probability] == [len(batch) for batch in tiles.batches]
    assert [one.shape for one in found.first_logits] == [(1, 2, 20, 20)]
    assert found.parameters == parameter_count(model_dir / "saved_model")


def test_a_gpu_that_tensorflow_already_runs_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from export.errors import ExportError
    from export.steps.reference import import_tensorflow

    def started(devices: object, kind: str) -> None:
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", started)
    with pytest.raises(ExportError, match="TensorFlow already runs on a GPU"):
        import_tensorflow()
