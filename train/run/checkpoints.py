"""Step-numbered checkpoints that appear whole or not at all, and the best weights of a run beside them."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from train.errors import TrainError
from unet.files import atomic_directory, read_json, sha256_of, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator

LOGGER = logging.getLogger(__name__)
KEPT = 3
_DISK_FAULTS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EXDEV, errno.EACCES, errno.EPERM)
_STATE, _MANIFEST, _LATEST = "state", "manifest.json", "latest.json"
# The network is served in float16, which holds nothing larger; sound weights lie far below 100.
_LARGEST_WEIGHT = float(np.finfo(np.float16).max)


@contextlib.contextmanager
def naming_disk_faults(path: Path) -> Iterator[None]:
    """Let the error of a disk name the file that was being written, whatever library wrote it.

    Raises:
        OSError: with the system's number of the fault and ``path``.
    """
    try:
        yield
    except (OSError, tf.errors.OpError) as error:
        known = getattr(error, "errno", None)
        for number in _DISK_FAULTS:
            if known == number or os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise


def diverged(variables: list[tf.Variable]) -> str:
    """What is wrong with the first variable that no longer holds weights, as half a sentence; "" if all are sound."""
    for variable in variables:
        if not variable.dtype.is_floating:
            continue
        if not bool(tf.reduce_all(tf.math.is_finite(variable))):
            return f"{variable.name} has values that are not numbers"
        if variable.trainable and float(tf.reduce_max(tf.abs(variable), axis=None)) > _LARGEST_WEIGHT:
            return f"{variable.name} has values beyond {_LARGEST_WEIGHT:.0f}, the largest number of float16"
    return ""


def write_state(folder: Path, objects: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write objects into ``folder``, whole or not at all, with the SHA-256 of each file and ``facts``.

    Raises:
        OSError: if the disk is full.
    """
    with naming_disk_faults(folder), atomic_directory(folder) as aside:
        tf.train.Checkpoint(**objects).write(str(aside / _STATE))
        sums = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
        (aside / _MANIFEST).write_text(json.dumps({**facts, "sha256": sums}), encoding="utf-8")


def facts_of(folder: Path) -> dict[str, Any] | None:
    """The facts of a folder of `write_state` whose files are as they were written, else None."""
    try:
        facts = read_json(folder / _MANIFEST)
        whole = all(sha256_of(folder / file) == digest for file, digest in facts.pop("sha256").items())
        facts["step"] = int(facts["step"])
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return dict(facts) if whole else None


def read_state(folder: Path, objects: dict[str, Any], *, partial: bool) -> None:
    """Load objects from a folder of `write_state`.

    Args:
        folder: which.
        objects: what to load into.
        partial: whether the folder may hold more than these objects, as for prediction.

    Raises:
        TrainError: if it holds other variables.
    """
    try:
        status = tf.train.Checkpoint(**objects).read(str(folder / _STATE))
        status.expect_partial() if partial else status.assert_existing_objects_matched()
    except (AssertionError, ValueError) as error:
        raise TrainError(
            f"{folder} is of another network or optimizer: repeat the run's own flags "
            "with --config config.json, or choose another --model_dir"
        ) from error


class Checkpoints:
    """Checkpoints in a folder, ``step-00000500/`` and so on, the newest few kept, and ``latest.json``, which names one.

    A run has two such folders: ``checkpoints/``, from which it resumes, and ``best/``, the weights that scored best on
    the validation part.
    """

    def __init__(self, folder: str | Path, *, kept: int = KEPT, **objects: Any) -> None:
        self.folder = Path(folder)
        self._kept = kept
        self._objects = objects

    def save(self, step: int, **facts: Any) -> None:
        """Write the state after ``step`` steps, then point to it, then drop all but the newest few.

        Args:
            step: finished steps.
            facts: anything else to keep with it, for JSON.

        Raises:
            OSError: if the disk is full; the checkpoints before stay as they were.
        """
        name = f"step-{step:08d}"
        write_state(self.folder / name, self._objects, {"step": step, **facts})
        self._point_to(name, step)

    def complete(self) -> None:
        """Do what a save that was cut off has left out."""
        newest = self.newest
        if newest is not None:
            self._point_to(newest[0].name, newest[1]["step"])

    def _point_to(self, name: str, step: int) -> None:
        path, latest = self.folder / _LATEST, {"checkpoint": name, "step": step}
        with naming_disk_faults(path):
            if not path.exists() or path.read_text(encoding="utf-8") != json.dumps(latest, indent=2) + "\n":
                write_json(path, latest)
        for old in self.names()[self._kept :]:
            shutil.rmtree(self.folder / old)

    def restore(self, *, partial: bool = False) -> int:
        """Load the newest whole checkpoint of sound weights and return its step.

        Args:
            partial: whether the checkpoint may hold more than the objects given here, as for prediction.

        Raises:
            TrainError: if there is none.
        """
        for name in self.names():
            facts = facts_of(self.folder / name)
            if facts is None:
                LOGGER.warning("%s is damaged: falling back to the checkpoint before it", self.folder / name)
                continue
            read_state(self.folder / name, self._objects, partial=partial)
            fault = diverged(self.variables)
            if fault:
                LOGGER.warning("%s has diverged (%s): falling back to the one before it", self.folder / name, fault)
                continue
            return int(facts["step"])
        raise TrainError(f"no usable checkpoint in {self.folder}: train with --exec_mode train first")

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of all objects."""
        return [variable for item in self._objects.values() for variable in item.variables]

    @property
    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The folder and the facts of the newest whole checkpoint, None if there is none."""
        found = ((self.folder / name, facts_of(self.folder / name)) for name in self.names())
        return next(((folder, facts) for folder, facts in found if facts is not None), None)

    def names(self) -> list[str]:
        """The checkpoints there are, newest first."""
        return sorted((path.name for path in self.folder.glob("step-*")), reverse=True)
