"""Train and score all folds in turn: ``python train/cross_validate.py --model_dir result [flags of main.py]``.

What is trained already is not trained again: a fold that was interrupted goes on from its newest checkpoint, and a fold
that has its scores is only read.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.config import parse_config
from train.input.dataset import FOLDS
from unet.errors import UnetError, command, say
from unet.files import atomic_file
from unet.measure import markdown
from unet.processes import child

if TYPE_CHECKING:
    from collections.abc import Sequence

MAIN = Path(__file__).with_name("main.py")
FIGURES = ("best_v_rand", "best_v_info", "dice", "pixel_error")


class CrossValidationError(UnetError):
    """A fold that could not be trained or scored."""


@dataclass(frozen=True)
class Fold:
    """One fold: its number and where its run is."""

    number: int
    folder: Path

    def train(self, launcher: Sequence[str], flags: Sequence[str]) -> None:
        """Train and score the fold where that has not been done.

        Raises:
            CrossValidationError: if the trainer fails.
        """
        if self._score_files():
            say(f"fold {self.number}: scored already, in {self.folder}")
            return
        line = [*launcher, sys.executable, str(MAIN), *flags, "--exec_mode", "train_and_evaluate"]
        line += ["--model_dir", str(self.folder), "--crossvalidation_idx", str(self.number), "--resume"]
        say(f"fold {self.number}:")
        with child(line) as trainer:
            trainer.wait()
        if trainer.returncode != 0 or not self._score_files():
            raise CrossValidationError(
                f"fold {self.number} was not scored: see {self.folder}; the same command goes on from there"
            )

    def scores(self) -> dict[str, float]:
        """The fold's scores: means over its held-out slices."""
        records = [json.loads(path.read_text(encoding="utf-8")) for path in self._score_files()]
        counts = [record["slices"] for record in records]
        return {name: float(np.average([record[name] for record in records], weights=counts)) for name in FIGURES}

    def _score_files(self) -> list[Path]:
        """One for each size of slices."""
        return sorted((self.folder / "eval").glob("scores-*.json"))


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of each row's scores."""
    lines = [[name, *(f"{row[key]:.4f}" for key in FIGURES)] for name, row in rows.items()]
    return markdown(["fold", "V_rand thin", "V_info thin", "Dice of the membrane", "pixel error"], lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train every fold, then print each one's scores, their mean and their standard deviation."""
    parser = argparse.ArgumentParser(
        prog="train/cross_validate.py",
        description="Train and score every fold in turn. All other flags are those of train/main.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--model_dir", type=Path, default=Path("result"), help="holds a folder for each fold")
    parser.add_argument("--ranks", type=int, default=1, help="ranks that train together; above 1 by horovodrun")
    chosen, flags = parser.parse_known_args(argv)
    parse_config(flags)  # so that a wrong flag is named before anything starts
    launcher = ["horovodrun", "-np", str(chosen.ranks), "--gloo"] if chosen.ranks > 1 else []
    if launcher:
        launcher[0] = str(Path(sys.executable).with_name("horovodrun"))
    folds = [Fold(number, chosen.model_dir / f"fold-{number}") for number in range(FOLDS)]
    for fold in folds:
        fold.train(launcher, flags)
    rows = {str(fold.number): fold.scores() for fold in folds}
    values = {name: [row[name] for row in rows.values()] for name in FIGURES}
    rows["mean"] = {name: float(np.mean(column)) for name, column in values.items()}
    rows["standard deviation"] = {name: float(np.std(column, ddof=1)) for name, column in values.items()}
    with atomic_file(chosen.model_dir / "folds.csv") as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["fold", *FIGURES])
        writer.writerows([name, *row.values()] for name, row in rows.items())
    say(f"held-out slices of each fold, each score at its best threshold:\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
