"""Trains nnU-Net's default 2-D configuration for so many minutes.

``tools/nnunet.py`` starts it in nnU-Net's environment. It needs nothing of this project, which is not installed there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

# nnU-Net's learning rate falls from epoch to epoch. Its own 1,000 epochs of 250 steps take days on a CPU.
_EPOCHS = 50
_TIMED_STEPS = 2
# A step of validation is a forward pass alone.
_FORWARD = 1 / 3


class Timed(nnUNetTrainer):
    """nnU-Net's trainer, whose schedule is fitted to a time by its first steps."""

    seconds = 0.0
    ended = 0.0

    def on_train_start(self) -> None:
        """Time some steps, which count, and lay the schedule over the rest of the time."""
        super().on_train_start()
        self.ended = time.monotonic() + self.seconds
        for number in range(1 + _TIMED_STEPS):
            if number == 1:
                started = time.monotonic()  # the first step allocates
            self.train_step(next(self.dataloader_train))
        step_s = (time.monotonic() - started) / _TIMED_STEPS
        steps = max(1, (self.ended - time.monotonic()) / step_s)
        self.num_epochs = max(1, min(_EPOCHS, int(steps / (1 + _FORWARD))))
        self.num_iterations_per_epoch = max(1, round(steps / self.num_epochs - _FORWARD))
        self.num_val_iterations_per_epoch = 1
        self.lr_scheduler = PolyLRScheduler(self.optimizer, self.initial_lr, self.num_epochs)

    def on_train_end(self) -> None:
        """Note how far beyond its time it is."""
        self.ended = time.monotonic() - self.ended
        super().on_train_end()


def main() -> None:
    """Train, and write each validation slice's probabilities and ``trained.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("preprocessed", type=Path, help="folder that nnU-Net's planner made of the data")
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--out", type=Path, required=True, help="file for what was trained")
    chosen = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    plans = json.loads((chosen.preprocessed / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    data = json.loads((chosen.preprocessed / "dataset.json").read_text())
    trainer = Timed(plans, "2d", 0, data, device=torch.device("cpu"))
    trainer.seconds = 60 * chosen.minutes
    trainer.run_training()
    trainer.perform_actual_validation(save_probabilities=True)
    done = {
        "minutes": chosen.minutes + trainer.ended / 60,
        "steps": 1 + _TIMED_STEPS + trainer.num_epochs * trainer.num_iterations_per_epoch,
        "batch_size": trainer.configuration_manager.batch_size,
        "patch_size": list(trainer.configuration_manager.patch_size),
        "probabilities": str(Path(trainer.output_folder) / "validation"),
    }
    chosen.out.write_text(json.dumps(done))


if __name__ == "__main__":
    main()
