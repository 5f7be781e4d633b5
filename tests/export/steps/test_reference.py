from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from export.gate.tiles import Tiles
from export.steps.reference import Outputs

COARSE = {"ONEDNN_DEFAULT_FPMATH_MODE": "BF16", "TF_SET_ONEDNN_FPMATH_MODE": "BF16"}
STATE = """
from export.steps.reference import import_tensorflow
tf = import_tensorflow()
from tensorflow.python.framework import config
import os
print(config.is_op_determinism_enabled(), tf.config.get_visible_devices("GPU"), os.environ["CUDA_VISIBLE_DEVICES"])
print(os.environ["ONEDNN_DEFAULT_FPMATH_MODE"], os.environ.get("TF_SET_ONEDNN_FPMATH_MODE"))
"""


def run(*arguments: str | Path, **environment: str) -> str:
    line = [sys.executable, *map(str, arguments)]
    done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return done.stdout


def test_it_runs_on_the_cpu_deterministic_whatever_the_users_environment_says() -> None:
    said = run(
        "-c", STATE, CUDA_VISIBLE_DEVICES="0", ONEDNN_DEFAULT_FPMATH_MODE="BF16", TF_SET_ONEDNN_FPMATH_MODE="BF16"
    )
    assert said.splitlines() == ["True [] -1", "STRICT None"]


def test_float32_stays_float32_where_the_users_environment_allows_bfloat16(
    model_dir: Path, tiles: Tiles, tmp_path: Path
) -> None:
    np.savez(tmp_path / "tiles.npz", *tiles.batches)
    found = []
    environments: tuple[dict[str, str], ...] = ({}, COARSE)
    for environment in environments:
        outputs = tmp_path / f"{len(environment)}.npz"
        words = ("-m", "export.steps.reference", model_dir / "saved_model", tmp_path / "tiles.npz", "1", outputs)
        run(*words, **environment)
        found.append(Outputs.read(outputs))
    assert [len(one.first_logits) for one in found] == [1, 1]
    np.testing.assert_array_equal(found[0].first_logits[0], found[1].first_logits[0])
    for one, other in zip(found[0].probability, found[1].probability):
        np.testing.assert_array_equal(one, other)


def test_a_gpu_that_tensorflow_already_runs_on_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow as tf

    from export.errors import ExportError
    from export.steps.reference import import_tensorflow

    def started(devices: object, kind: str) -> None:
        raise RuntimeError("Visible devices cannot be modified after being initialized")

    monkeypatch.setattr(tf.config, "set_visible_devices", started)
    with pytest.raises(ExportError, match="TensorFlow already runs on a GPU"):
        import_tensorflow()
