"""What training and exporting write."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import tifffile

from tests.torture.faults.writer import JOBS, Writer
from train.config import FOLDS
from unet.phantom import synthetic_stack

_NETWORK = ("tensorflow", "train.run.checkpoints", "train.model.saved_model")


def of_runs(folder: Path) -> list[Writer]:
    """What is written of a run, of its folds and of its network; what they read is made in ``folder``."""

    def trained(out: Path) -> None:
        if not (folder / "run").exists():
            _train(folder)
        shutil.copytree(folder / "run", out)

    return [
        Writer("export", f"{JOBS}:export", lambda out: [str(out / "artefacts")], finals=("artefacts",), timed=True),
        Writer(
            "training",
            f"{JOBS}:train",
            lambda out: [str(out)],
            finals=(),
            timed=True,
            libraries=_NETWORK,
            unsound=_training_faults,
        ),
        Writer(
            "SavedModel",
            f"{JOBS}:saved_model",
            lambda out: [str(out / "saved_model")],
            finals=("saved_model",),
            libraries=_NETWORK,
        ),
        Writer(
            "curves of a run",
            f"{JOBS}:curves",
            lambda out: [str(out)],
            _logged,
            finals=("*.png", "eval/*.csv", "eval/*.png"),
        ),
        Writer(
            "report of a run",
            "train.report.__main__:main",
            lambda out: ["--model_dir", str(out)],
            trained,
            finals=("report.html",),
            libraries=(*_NETWORK, "train.report.page"),
        ),
        Writer(
            "table of the folds",
            "train.cross_validate:main",
            lambda out: ["--model_dir", str(out)],
            _scored,
            finals=("folds.csv",),
            libraries=("train.cross_validate",),
        ),
        Writer(
            "BioImage.IO package",
            f"{JOBS}:package",
            lambda out: [str(out / "artefacts")],
            finals=("artefacts",),
            timed=True,
            libraries=("bioimageio.spec", "onnxruntime"),
        ),
    ]


def _train(folder: Path) -> None:
    """A run of two steps."""
    (data := folder / "slices").mkdir()
    images, labels = synthetic_stack(slices=5, size=96, seed=1)
    tifffile.imwrite(data / "train-volume.tif", images)
    tifffile.imwrite(data / "train-labels.tif", labels * images.dtype.type(255))
    line = [sys.executable, "train/main.py", "--exec_mode=train", f"--data_dir={data}", f"--model_dir={folder / 'run'}"]
    line += ["--base_filters=1", "--tile_size=188", "--max_steps=2", "--crossvalidation_idx=4"]
    subprocess.run(line, cwd=Path(__file__).resolve().parents[3], check=True, capture_output=True)


def _scored(out: Path) -> None:
    """The scores of all folds."""
    from train.cross_validate import FIGURES

    for number in range(FOLDS):
        scores = {"held_out": True, "slices": 2, **dict.fromkeys(FIGURES, 0.9 + number / 100)}
        (out / f"fold-{number}" / "eval").mkdir(parents=True)
        (out / f"fold-{number}" / "eval" / "scores-96x96.json").write_text(json.dumps(scores))


def _logged(out: Path) -> None:
    """The log of a run."""
    out.mkdir()
    lines = [f'DLLL {{"step": {step}, "data": {{"loss": {1 / step}}}}}\n' for step in (1, 2, 3)]
    (out / "log.json").write_text("".join(lines))


def _training_faults(out: Path) -> list[str]:
    """A training run's files are whole, and each folder of checkpoints names one that is there."""
    wrong = []
    for path in out.rglob("*.json"):
        if ".aside" not in str(path) and path.name != "log.json":
            try:
                named = json.loads(path.read_text())
            except ValueError:
                wrong.append(f"half-written: {path.name}")
                continue
            if path.name == "latest.json" and not (path.parent / named["checkpoint"] / "manifest.json").exists():
                wrong.append(f"{path} names a checkpoint that is not there")
    return wrong
