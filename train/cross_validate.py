"""Train and score all folds in turn: ``python train/cross_validate.py --model_dir result [flags of main.py]``.

What is trained already is not trained again: a fold that was interrupted resumes from its newest checkpoint, and a fold
that has its scores is only read.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train.config import FOLDS, config_of, parse_flags
from train.errors import TrainError
from train.input.fitting import settings_of
from train.run.folder import Run
from unet.errors import command, say
from unet.files import atomic_file, read_json
from unet.measure import markdown
from unet.processes import child

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.config import TrainConfig

MAIN = Path(__file__).with_name("main.py")
# At the threshold that each fold's validation slices chose, and the challenge's own at the best threshold of all.
FIGURES = ("v_rand_at_threshold", "v_info_at_threshold", "dice", "pixel_error", "best_v_rand", "best_v_info")
TITLES = ("V_rand", "V_info", "Dice of the membrane", "pixel error", "V_rand, best threshold", "V_info, best threshold")


@dataclass(frozen=True)
class Fold:
    """One fold: its number and where its run is."""

    number: int
    folder: Path

    def check(self, config: TrainConfig) -> None:
        """Refuse a folder that holds a run of other settings: its scores would be printed as those of these.

        Raises:
            TrainError: which names the settings.
        """
        changes = Run(self.folder).changes(config)
        if changes:
            raise TrainError(
                f"{self.folder} holds a run of other settings ({', '.join(changes)}): repeat its settings, or choose "
                "another --model_dir"
            )

    def train(self, launcher: Sequence[str], flags: Sequence[str]) -> None:
        """Train and score the fold if that has not been done.

        Raises:
            TrainError: if the trainer fails.
        """
        if self.is_scored:
            say(f"fold {self.number}: scored already, in {self.folder}")
            return
        line = [*launcher, sys.executable, str(MAIN), *flags, "--exec_mode", "train_and_evaluate"]
        line += ["--model_dir", str(self.folder), "--crossvalidation_idx", str(self.number), "--resume"]
        say(f"fold {self.number}:")
        with child(line) as trainer:
            trainer.wait()
        if trainer.returncode != 0 or not self.is_scored:
            raise TrainError(f"fold {self.number} was not scored: see {self.folder}; the same command continues there")

    @property
    def is_scored(self) -> bool:
        """Whether the fold was trained and scored."""
        return bool(self._score_files())

    def scores(self) -> dict[str, float]:
        """The fold's scores: means over its held-out slices.

        Raises:
            TrainError: if they are of slices that were trained on.
        """
        records = [read_json(path) for path in self._score_files()]
        if not all(record["held_out"] for record in records):
            raise TrainError(f"{self.folder} has scores of slices that were trained on: choose another --model_dir")
        counts = [record["slices"] for record in records]
        return {name: float(np.average([record[name] for record in records], weights=counts)) for name in FIGURES}

    def _score_files(self) -> list[Path]:
        """One for each size of slices."""
        return sorted((self.folder / "eval").glob("scores-*.json"))


def folds_in(model_dir: Path) -> list[Fold]:
    """The folds whose runs are, or will be, in a folder."""
    return [Fold(number, model_dir / f"fold-{number}") for number in range(FOLDS)]


def with_means(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The scores of each fold, two or more, and below them their means and standard deviations."""
    values = {name: [row[name] for row in rows.values()] for name in FIGURES}
    means = {name: float(np.mean(column)) for name, column in values.items()}
    deviations = {name: float(np.std(column, ddof=1)) for name, column in values.items()}
    return {**rows, "mean": means, "standard deviation": deviations}


def table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table of each row's scores."""
    lines = [[name, *(f"{row[key]:.4f}" for key in FIGURES)] for name, row in rows.items()]
    return markdown(["fold", *TITLES], lines)


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
    asked = parse_flags(flags, minutes=True)  # so that a wrong flag is named before anything starts
    for reserved in ("exec_mode", "crossvalidation_idx", "resume"):
        if reserved in asked:
            raise TrainError(f"--{reserved} is set for each fold here: leave it out")
    given = settings_of(asked)
    launcher = ["horovodrun", "-np", str(chosen.ranks), "--gloo"] if chosen.ranks > 1 else []
    if launcher:
        launcher[0] = str(Path(sys.executable).with_name("horovodrun"))
    folds = folds_in(chosen.model_dir)
    for fold in folds:
        fold.check(config_of({**given, "crossvalidation_idx": fold.number}).for_ranks(chosen.ranks))
    for fold in folds:
        fold.train(launcher, flags)
    rows = with_means({str(fold.number): fold.scores() for fold in folds})
    with atomic_file(chosen.model_dir / "folds.csv") as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["fold", *FIGURES])
        writer.writerows([name, *row.values()] for name, row in rows.items())
    say(f"held-out slices of each fold, at the threshold that its validation slices chose:\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
