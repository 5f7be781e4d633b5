from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import tifffile


def train_on(
    ranks: int, batch_size: int, phantom_dir: Path, result: Path, project_root: Path, *more: str, steps: int = 4
) -> None:
    """Some steps with everything that is random switched on."""
    python = [sys.executable, str(project_root / "train" / "main.py")]
    launcher = [str(Path(sys.executable).parent / "horovodrun"), "-np", str(ranks), "--gloo"] if ranks > 1 else []
    flags = {
        "exec_mode": "train",
        "data_dir": phantom_dir,
        "model_dir": result,
        "batch_size": batch_size,
        "max_steps": steps,
        "base_filters": 2,
        "tile_size": 204,
        "optimizer": "momentum",
        "momentum": 0.9,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    done = subprocess.run(
        [*launcher, *python, *words, "--augment", *more], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{ranks} ranks x {batch_size} windows" in done.stdout
    # Only the first rank speaks.
    assert done.stdout.count(f"step {steps} of {steps}:") == 1


def test_two_ranks_equal_one_process_with_the_same_global_batch(
    phantom_dir: Path, tmp_path: Path, project_root: Path
) -> None:
    """Also where pixels are not annotated, and where the two ranks were interrupted and resumed."""
    import tensorflow as tf

    data = tmp_path / "data"
    data.mkdir()
    labels = tifffile.imread(phantom_dir / "train-labels.tif")
    labels[:, :30] = 7
    tifffile.imwrite(data / "train-labels.tif", labels, photometric="minisblack")
    (data / "train-volume.tif").symlink_to(phantom_dir / "train-volume.tif")
    weights, scores = [], []
    for ranks in (1, 2):
        result = tmp_path / f"{ranks}-ranks"
        for steps in (4,) if ranks == 1 else (2, 4):
            resume = ["--resume"] if steps == 4 else []
            flags = ["--ignore_label=7", "--validation_share=0.4", *resume]
            train_on(ranks, 2 // ranks, data, result, project_root, *flags, steps=steps)
        loaded = tf.train.load_checkpoint(str(result / "checkpoints" / "step-00000004" / "state"))
        names = [name for name in loaded.get_variable_to_shape_map() if name.startswith("model/layer")]
        weights.append([loaded.get_tensor(name) for name in sorted(names)])
        record = json.loads((result / "log.json").read_text().splitlines()[-2].removeprefix("DLLL "))["data"]
        scores.append([record[name] for name in ("v_rand", "v_info", "dice", "threshold")])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert len(weights[0]) == 46
    for one, two in zip(*weights):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_compressed_gradients_are_rounded_and_no_more(phantom_dir: Path, tmp_path: Path, project_root: Path) -> None:
    import tensorflow as tf

    weights = []
    for more in ([], ["--fp16_compression"]):
        result = tmp_path / f"result-{len(more)}"
        train_on(2, 1, phantom_dir, result, project_root, *more)
        variables = tf.saved_model.load(str(result / "saved_model")).model.variables
        weights.append(np.concatenate([v.numpy().ravel() for v in variables]))
    difference = np.abs(weights[0] - weights[1]).max()
    # float16 keeps 11 bits of a gradient.
    assert 1e-8 < difference < 1e-3


@pytest.mark.slow
def test_one_process_needs_no_horovod_and_one_of_several_says_so(
    phantom_dir: Path, tmp_path: Path, project_root: Path
) -> None:
    without = "import runpy, sys; sys.modules['horovod'] = None; runpy.run_path(sys.argv[0], run_name='__main__')"
    code = f"import sys; sys.argv = sys.argv[1:]; {without}"
    flags = ["--exec_mode=train", f"--data_dir={phantom_dir}", f"--model_dir={tmp_path}", "--max_steps=1"]
    line = [sys.executable, "-c", code, "train/main.py", *flags, "--base_filters=2", "--tile_size=188"]
    for ranks, exit_code in (({}, 0), ({"HOROVOD_RANK": "0"}, 2)):
        environment = {**os.environ, "PYTHONPATH": str(project_root), **ranks}
        done = subprocess.run(line, cwd=project_root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == exit_code, done.stderr
    assert done.stderr.startswith("error: this is one of several ranks but Horovod cannot be loaded")


def ranks_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """The training processes below a launcher, without its shells and helpers."""
    below = psutil.Process(launcher.pid).children(recursive=True)
    return [process for process in below if str(Path("train") / "main.py") in " ".join(process.cmdline()[1:2])]


def test_sigterm_to_one_rank_saves_on_all_ranks_and_exits_0(
    phantom_dir: Path, tmp_path: Path, project_root: Path
) -> None:
    # Not to the launcher: horovodrun kills its ranks 5 s after a SIGTERM of its own, be they done or not.
    line = [str(Path(sys.executable).parent / "horovodrun"), "-np", "2", "--gloo", sys.executable]
    flags = {
        "exec_mode": "train",
        "data_dir": phantom_dir,
        "model_dir": tmp_path,
        "optimizer": "adam",
        "max_steps": 100_000,
        "base_filters": 2,
        "tile_size": 204,
        "log_every": 1,
    }
    line += [str(project_root / "train" / "main.py"), *(f"--{name}={value}" for name, value in flags.items())]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as launcher:
        assert launcher.stdout is not None
        for text in launcher.stdout:
            if "step 2 of" in text:
                ranks = ranks_of(launcher)
                assert len(ranks) == 2
                ranks[1].terminate()
                break
        rest = launcher.stdout.read()
    assert launcher.returncode == 0
    assert rest.count("which is saved: continue with --resume") == 1
    assert json.loads((tmp_path / "checkpoints" / "latest.json").read_text(encoding="utf-8"))["step"] >= 2
