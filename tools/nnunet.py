"""This project's network beside nnU-Net's: the same slices, cores and minutes, ``python -m tools.nnunet --minutes 15``.

nnU-Net (Isensee et al. 2021) runs its default 2-D configuration in an environment of its own, which ``make nnunet``
makes. Its schedule is fitted to the time, as ours is: its own 1,000 epochs take days on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.own_folder import clear_own
from train.config import FOLDS, config_of
from train.input.split import Data, load_data
from train.input.store import Slice
from train.scoring import Tally, tally
from unet.errors import UnetError, command, say
from unet.files import read_json, write_json
from unet.machine import machine
from unet.measure import markdown
from unet.processes import child
from unet.volume import NOT_ANNOTATED

ROOT = Path(__file__).resolve().parents[1]
_NAME = "Dataset001_slices"
# Where nnU-Net cuts: it takes the likelier class.
_ARGMAX = 0.5
_COLUMNS = ("v_rand_at_threshold", "v_info_at_threshold", "pixel_error", "best_v_rand", "best_v_info")


class NnunetError(UnetError):
    """nnU-Net could not be trained."""


def write_cases(folder: Path, data: Data) -> list[str]:
    """Write the labelled slices as nnU-Net wants them, membrane as class 1, and return the names of the held-out ones.

    Args:
        folder: nnU-Net's folder of raw data.
        data: all slices.
    """
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    slices = [*data.training, *data.held_out]
    for number, item in enumerate(slices):
        cv2.imwrite(str(folder / "imagesTr" / f"{name_of(number)}_0000.png"), np.asarray(item.image))
        cv2.imwrite(str(folder / "labelsTr" / f"{name_of(number)}.png"), classes(item))
    labels = {"background": 0, "membrane": 1}
    if any((item.label == NOT_ANNOTATED).any() for item in slices):
        labels["ignore"] = 2
    dataset = {"channel_names": {"0": "em"}, "labels": labels, "numTraining": len(slices), "file_ending": ".png"}
    write_json(folder / "dataset.json", dataset)
    return [name_of(number) for number in range(len(data.training), len(slices))]


def name_of(number: int) -> str:
    """A case's name, in the order of the slices."""
    return f"slice_{number:04}"


def classes(item: Slice) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """nnU-Net's label of a slice, uint8 [H, W]: 0 cell, 1 membrane, 2 where nobody annotated."""
    table = np.full(256, 2, np.uint8)
    table[[1, 0]] = 0, 1
    return table[np.asarray(item.label)]


class Nnunet:
    """nnU-Net in an environment of its own.

    Args:
        python: of that environment.
        out: folder for all that it writes.
    """

    def __init__(self, python: Path, out: Path) -> None:
        if not python.exists():
            raise NnunetError(f"{python} does not exist: `make nnunet` installs nnU-Net there and starts this command")
        self._python, self._out = python, out
        folders = {f"nnUNet_{part}": str(out / part) for part in ("raw", "preprocessed", "results")}
        self._environment = {**os.environ, **folders, "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "2"}

    def train(self, data: Data, minutes: float) -> tuple[Mapping[str, Any], Tally]:
        """Plan, train, and score the held-out slices; what was trained, and the scores.

        Raises:
            NnunetError: if a step fails.
        """
        held_out = write_cases(self._out / "raw" / _NAME, data)
        program = self._python.with_name("nnUNetv2_plan_and_preprocess")
        self._run("plans and preprocesses", program, "-d", "1", "-c", "2d", "-np", "2", "--verify_dataset_integrity")
        ready = self._out / "preprocessed" / _NAME
        trained_on = [name_of(number) for number in range(len(data.training))]
        write_json(ready / "splits_final.json", [{"train": trained_on, "val": held_out}])
        record = self._out / "trained.json"
        worker = ROOT / "tools" / "nnunet_worker.py"
        self._run("trains", self._python, worker, ready, "--minutes", str(minutes), "--out", record)
        done = read_json(record)
        answers = iter([self._cell(Path(done["probabilities"]) / f"{name}.npz") for name in held_out])
        return done, tally(lambda image: next(answers)[: image.shape[0], : image.shape[1]], data.held_out)

    def _run(self, what: str, *line: str | Path) -> None:
        log = self._out / "nnunet.log"
        say(f"nnU-Net {what}; its output is in {log}")
        with child([str(word) for word in line], log=log, environment=self._environment) as process:
            process.wait()
        if process.returncode:
            raise NnunetError(f"nnU-Net failed ({what}): see the end of {log}")

    @staticmethod
    def _cell(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Its probability that a pixel is not membrane, float32 [H, W]."""
        with np.load(path) as arrays:
            found: np.ndarray[Any, np.dtype[np.float32]] = arrays["probabilities"][0, 0].astype(np.float32)
        return found


def train_ours(data_dir: str, fold: int, minutes: float, out: Path) -> Mapping[str, Any]:
    """Our trainer's scores, from nothing but the data and the minutes.

    Raises:
        NnunetError: if it fails.
    """
    line = [sys.executable, str(ROOT / "train" / "main.py"), "--data_dir", data_dir, "--model_dir", str(out)]
    line += ["--minutes", str(minutes), "--crossvalidation_idx", str(fold), "--exec_mode", "train_and_evaluate"]
    with child(line) as trainer:
        trainer.wait()
    scores = sorted((out / "eval").glob("scores-*.json"))
    if trainer.returncode or len(scores) != 1:
        raise NnunetError(f"our trainer failed, or the slices are of several sizes: see {out}")
    record: Mapping[str, Any] = read_json(scores[0])
    return record


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train both, score both, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.nnunet", description=str(__doc__).partition(".\n")[0])
    parser.add_argument("--data_dir", default="data", help="labelled stacks")
    parser.add_argument("--fold", type=int, default=FOLDS - 1, choices=range(FOLDS), help="the fold that is held out")
    parser.add_argument("--minutes", type=float, default=15.0, help="of training, for each")
    parser.add_argument(
        "--python", type=Path, default=Path(".venv-nnunet/bin/python"), help="where nnU-Net is installed"
    )
    parser.add_argument("--out", type=Path, default=Path("nnunet"), help="folder for both; a former one is replaced")
    chosen = parser.parse_args(argv)
    peer = Nnunet(chosen.python.absolute(), chosen.out.absolute())
    given = {"data_dir": chosen.data_dir, "crossvalidation_idx": chosen.fold, "validation_share": 0.0}
    data = load_data(config_of(given))
    clear_own(chosen.out, "nnunet", NnunetError)
    ours = train_ours(chosen.data_dir, chosen.fold, chosen.minutes, chosen.out / "ours")
    done, scores = peer.train(data, chosen.minutes)
    theirs = scores.as_dict(_ARGMAX)
    write_json(chosen.out / "nnunet.json", {"ours": ours, "nnunet": theirs, "trained": dict(done)})
    say(
        f"fold {chosen.fold}, {chosen.minutes:g} minutes of training each, {machine()}; nnU-Net took {done['steps']} "
        f"steps of {done['batch_size']} windows of {done['patch_size']} in {done['minutes']:.1f} minutes"
    )
    rows = [
        [name, *(f"{record[key]:.4f}" for key in _COLUMNS)] for name, record in (("ours", ours), ("nnU-Net", theirs))
    ]
    say(markdown(["", "V_rand", "V_info", "pixel error", "V_rand, best threshold", "V_info, best threshold"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
