"""Settings that follow from the data and the machine: ``train/main.py --data_dir D --minutes N`` and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.config import FOLDS, read_settings
from train.input.pairs import find_pairs
from train.run.launcher import is_first_rank
from unet.errors import say
from unet.geometry import valid_size_for
from unet.machine import run_tool
from unet.volume import NOT_ANNOTATED, LabelOptions, label_blocks, open_volume

if TYPE_CHECKING:
    from collections.abc import Mapping

# What a few slices of a stack say of its membrane stands for the rest.
_LOOKED_AT = 8
_LARGEST_WINDOW = 444
# The time decides.
_NO_LIMIT = 1_000_000_000
# What reached the scores of docs/training.md, whatever the data.
RECIPE: dict[str, Any] = {
    "augment": True,
    "use_amp": True,
    "batch_size": 2,
    "optimizer": "adam",
    "learning_rate": 0.001,
    "clip_norm": 1.0,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 100,
    "weight_decay": 0.0,
    "dropout": 0.2,
    "log_every": 20,
}


@dataclass(frozen=True)
class Facts:
    """What is known of the labelled stacks of a folder.

    Attributes:
        slices: in all.
        side: the shorter side of the smallest slice.
        membrane: share of the annotated pixels.
        annotated: share of all pixels.
    """

    slices: int
    side: int
    membrane: float
    annotated: float

    @classmethod
    def of(cls, data_dir: str, options: LabelOptions) -> Facts:
        """Look at the first slices of each stack.

        Raises:
            TrainError: there is no labelled stack.
            StackError: one cannot be read.
        """
        slices, sides, counts = 0, [], np.zeros(3, np.int64)
        for images, labels in find_pairs(data_dir):
            with open_volume(images) as volume:
                slices += len(volume)
                sides.append(min(volume.height, volume.width))
            for page, _, rows in label_blocks(labels, options):
                if page == _LOOKED_AT:
                    break
                known = int(np.count_nonzero(rows != NOT_ANNOTATED))
                counts += np.count_nonzero(rows == 0), known, rows.size
        return cls(slices, min(sides), float(counts[0] / max(1, counts[1])), float(counts[1] / max(1, counts[2])))

    def __str__(self) -> str:
        return (
            f"{self.slices} slices, {self.side} pixels on their shorter side, {self.annotated:.0%} annotated, "
            f"{self.membrane:.0%} of it membrane"
        )


def fitted(given: Mapping[str, Any], minutes: float) -> tuple[dict[str, Any], Facts]:
    """The given settings, and for all others what suits the data and the machine.

    Args:
        given: by flags; they count.
        minutes: of training.

    Raises:
        TrainError, StackError: see `Facts.of`.
    """
    facts = Facts.of(str(given.get("data_dir", "data")), LabelOptions.of(given))
    # One fold is kept for scores where enough slices are left to learn from.
    scored = facts.slices >= 2 * FOLDS
    # A missed pixel of the rarer class costs more, and less than its rarity: all of it draws membrane too thick.
    weight = math.sqrt((1 - facts.membrane) / max(facts.membrane, 0.01))
    chosen = {
        **RECIPE,
        "max_steps": _NO_LIMIT,
        "max_minutes": minutes,
        "base_filters": 64 if run_tool("nvidia-smi", "-L") else 16,
        "tile_size": min(_LARGEST_WINDOW, valid_size_for(facts.side)),
        "membrane_weight": round(min(4.0, max(1.0, weight)), 1),
        "crossvalidation_idx": FOLDS - 1 if scored else -1,
        "exec_mode": "train_and_evaluate" if scored else "train",
    }
    return {**chosen, **given}, facts


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The given settings; with ``--minutes`` those too that follow from the data. A resumed run has its own."""
    minutes = given.pop("minutes", None)
    if minutes is None:
        return given
    record = Path(given.get("model_dir", "result")) / "config.json"
    if given.get("resume") and record.exists():
        # The mode alone is a command's and not a run's.
        return {"exec_mode": read_settings(record)["exec_mode"], **given, "max_minutes": minutes}
    settings, facts = fitted(given, minutes)
    if is_first_rank():
        new = {name: value for name, value in settings.items() if name not in given and value != _NO_LIMIT}
        chosen = " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in new.items())
        say(f"{facts}; so, where nothing else is asked for: {chosen}")
    return settings
