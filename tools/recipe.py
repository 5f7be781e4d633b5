"""What the demo trains and measures, and how long its steps usually take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from train.input.fitting import RECIPE

# Of a stack of 30 slices, fold 4 is slices 24 to 29. Two of the others validate: slices that are trained on choose a
# wrong threshold. One process with two windows a step is faster on one machine than two ranks with one window each.
FLAGS = {
    **{name: "" if value is True else str(value) for name, value in RECIPE.items()},
    "crossvalidation_idx": "4",
    "base_filters": "16",
    "tile_size": "444",
    "max_steps": "1200",
    "membrane_weight": "2",
    "validation_share": "0.1",
}
QUICK_FLAGS = {
    **FLAGS,
    "base_filters": "4",
    "tile_size": "236",
    "max_steps": "20",
    "evaluate_every": "10",
    "log_every": "10",
}
# Minutes of training at most; the steps of FLAGS are enough for its scores, so a fast machine needs less.
MINUTES = 6.0
# With a budget of one's own there is no limit but that.
NO_LIMIT = "1000000000"
RANKS = 2
RANK_FLAGS = {
    **QUICK_FLAGS,
    "batch_size": "1",
    "max_steps": "10",
    "evaluate_every": "0",
    "log_every": "2",
}
# Seconds that each step takes on two cores of a machine on which a training step takes REFERENCE_STEP_S.
REFERENCE_STEP_S = 0.15
USUAL_S = {
    "synthetic stack": 8,
    "two Horovod ranks": 20,
    "export": 45,
    "publish": 1,
    "start Triton": 4,
    "segment": 5,
    "segment held-out slices": 3,
    "score": 3,
    "benchmark": 60,
    "stop Triton": 3,
}
# These wait for a clock, not for the processor.
CLOCKED = ("start Triton", "stop Triton")

QUICK_EXPORT = ("--tile_sizes", "572", "--no_int8")
BENCHMARK = ("--rounds", "2", "--seconds", "3")
QUICK_BENCHMARK = ("--seconds", "1", "--rounds", "1", "--batch_sizes", "1", "--slices", "4")

REAL_DATA = (
    "The real slices (ISBI 2012, free for non-commercial work) come by `.venv/bin/python train/download_dataset.py "
    "--data_dir data`; then run `make demo` again."
)


def trainer_line(data_dir: Path, results: Path, flags: Mapping[str, str]) -> list[str | Path]:
    """The trainer's command; a flag whose value is empty is a switch."""
    return [
        *("python", "train/main.py", "--exec_mode", "train", "--data_dir", data_dir, "--model_dir", results),
        *(word for name, value in flags.items() for word in (f"--{name}", value) if word),
    ]
