"""Step-numbered checkpoints that appear whole or not at all, then a pointer to the newest."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from pathlib import Path

import tensorflow as tf

from unet.errors import UnetError
from unet.files import atomic_directory, sha256_of, write_json

LOGGER = logging.getLogger(__name__)
KEPT = 3


class CheckpointError(UnetError):
    """No checkpoint that can be used."""


class Checkpoints:
    """The checkpoints of one run: ``checkpoints/step-00000500/`` and so on, and ``checkpoints/latest.json``."""

    def __init__(self, model_dir: str | Path, **objects: tf.Module) -> None:
        self.folder = Path(model_dir) / "checkpoints"
        self._checkpoint = tf.train.Checkpoint(**objects)

    def save(self, step: int) -> None:
        """Write the state after ``step`` steps, then point to it, then drop all but the newest few.

        Raises:
            OSError: if the disk is full; the checkpoints before stay as they were.
        """
        name = f"step-{step:08d}"
        with atomic_directory(self.folder / name) as aside:
            try:
                self._checkpoint.write(str(aside / "state"))
            except tf.errors.OpError as error:
                full = os.strerror(errno.ENOSPC)
                if full not in str(error):
                    raise
                raise OSError(errno.ENOSPC, full, str(self.folder / name)) from error
            sums = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
            (aside / "manifest.json").write_text(json.dumps({"step": step, "sha256": sums}), encoding="utf-8")
        write_json(self.folder / "latest.json", {"checkpoint": name, "step": step})
        for old in self._names()[KEPT:]:
            shutil.rmtree(self.folder / old)

    def restore(self, *, partial: bool = False) -> int:
        """Load the newest whole checkpoint and return its step.

        Args:
            partial: whether the checkpoint may hold more than the objects given here, as for prediction.

        Raises:
            CheckpointError: if there is none.
        """
        for name in self._names():
            step = self._whole(name)
            if step is None:
                LOGGER.warning("%s is damaged: falling back to the checkpoint before it", self.folder / name)
                continue
            try:
                status = self._checkpoint.read(str(self.folder / name / "state"))
                status.expect_partial() if partial else status.assert_existing_objects_matched()
            except (AssertionError, ValueError) as error:
                raise CheckpointError(
                    f"{self.folder / name} is of another network or optimizer: repeat the run's own flags "
                    "with --config config.json, or choose another --model_dir"
                ) from error
            return step
        raise CheckpointError(f"no usable checkpoint in {self.folder}: train with --exec_mode train first")

    def exist(self) -> bool:
        """Whether there is any."""
        return bool(self._names())

    def _names(self) -> list[str]:
        """The checkpoints there are, newest first."""
        return sorted((path.name for path in self.folder.glob("step-*")), reverse=True)

    def _whole(self, name: str) -> int | None:
        """The step of a checkpoint whose files are as they were written, else None."""
        folder = self.folder / name
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            whole = all(sha256_of(folder / file) == digest for file, digest in manifest["sha256"].items())
        except (OSError, ValueError, KeyError):
            return None
        return int(manifest["step"]) if whole else None
