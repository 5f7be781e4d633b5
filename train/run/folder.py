"""The folder of a training run: who may write into it, and what it records of the run."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import FACTS, TrainConfig, config_of, default_of, read_settings
from train.errors import TrainError
from train.run.checkpoints import Checkpoints, diverged
from unet.card import SEAL, seal_of
from unet.files import read_json, remove_abandoned, write_json
from unet.names import DEFAULT_THRESHOLD

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import tensorflow as tf

RECORD = "config.json"
_LOCK = ".lock"
LOGGER = logging.getLogger(__name__)
# Settings that are about one command, and not about the run that it continues or scores.
_OF_A_COMMAND = ("exec_mode", "benchmark", "resume", "tta", "also", "preview_augmentation", "model_dir")


class Run:
    """One run's folder, ``--model_dir``.

    It is looked at first, then locked, and only then written: a command that is refused changes nothing in it. What was
    held out, the seed and the shape of the network are facts of the run; they are read from ``config.json``, and a flag
    that contradicts one is refused. The record is sealed: one that was changed or damaged is refused.

    Attributes:
        folder: the folder; it need not exist yet.
        record: what ``config.json`` holds but for its seal, empty if there is none.

    Raises:
        TrainError: ``config.json`` is not as a run wrote it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.record: dict[str, Any] = {}
        self._seen: list[str] | None = None
        if self.path.exists():
            read_settings(self.path)  # which says what is wrong with it
            record = read_json(self.path)
            if record.pop(SEAL, None) != seal_of(record):
                raise TrainError(
                    f"{self.path} is not as a run of this version wrote it, so what the run held out is not known: put "
                    "the former file back, or train elsewhere; --config takes settings from a file that was changed"
                )
            self.record = record

    @property
    def path(self) -> Path:
        """The file of the record."""
        return self.folder / RECORD

    @property
    def threshold(self) -> float:
        """The threshold at which the weights scored best on the validation part, or else on slices trained on."""
        best = self.best().newest
        if best is not None:
            return float(best[1]["threshold"])
        return float(self.record.get("trained", {}).get("threshold", DEFAULT_THRESHOLD))

    @property
    def threshold_from(self) -> str:
        """What chose the threshold: "validation", "training", or "default" for one half before a run has ended."""
        if self.best().names():
            return "validation"
        return str(self.record.get("trained", {}).get("threshold_from", "default"))

    @property
    def held_out(self) -> dict[str, Any]:
        """What was never trained on nor chose anything: pages of stacks, or of those with few pages rows of each."""
        pages, rows = (self.record.get(name, {}) for name in ("held_out", "held_out_rows"))
        return {**pages, **{stack: f"rows {first} to {last}" for stack, (first, last) in rows.items()}}

    def checkpoints(self, **objects: Any) -> Checkpoints:
        """The checkpoints that a run resumes from."""
        return Checkpoints(self.folder / "checkpoints", **objects)

    def best(self, model: tf.keras.Model | None = None) -> Checkpoints:
        """The weights that scored best on the validation part."""
        return Checkpoints(self.folder / "best", kept=1, **({} if model is None else {"model": model}))

    def load_trained(self, model: tf.keras.Model) -> tuple[str, int]:
        """Load the run's best weights, or its newest where it has no best, as the SavedModel has them.

        Returns:
            "best" or "newest", and the weights' step.

        Raises:
            TrainError: if there are none, or none that are sound.
        """
        best = self.best(model)
        if best.newest is not None:
            return "best", best.restore(partial=True)
        return "newest", self.checkpoints(model=model).restore(partial=True)

    def configure(self, given: Mapping[str, Any]) -> TrainConfig:
        """The settings of a command on this run: the run's own, changed by what the command gives.

        Raises:
            TrainError: if the folder holds another run, or the command contradicts a fact of this one.
        """
        asked = config_of(given)
        self._seen = self.checkpoints().names()
        used = bool(self._seen)
        if asked.trains and not asked.resume:
            if used:
                raise TrainError(
                    f"{self.folder / 'checkpoints'} holds the checkpoints of another run: add --resume to continue it, "
                    "or choose another --model_dir"
                )
            return asked
        if asked.benchmark or asked.preview_augmentation or asked.exec_mode == "benchmark":
            return asked
        if used and not self.record:
            raise TrainError(
                f"{self.path} is missing, so what the run held out is not known: put it back, or train elsewhere"
            )
        if not used and asked.trains:
            return asked
        return self._continued(given)

    def _continued(self, given: Mapping[str, Any]) -> TrainConfig:
        settings = dict(self.record.get("settings", {}))
        for name in FACTS:
            known = settings.get(name, default_of(name))
            if name in given and given[name] != known:
                raise TrainError(
                    f"--{name} {given[name]} contradicts the run in {self.folder}, which has {known}: leave the flag "
                    "out, or train in another --model_dir"
                )
        changed = dict(given)
        if self.record.get("fitted") and changed.get("max_minutes"):
            # The run was fitted to that time already; the same command continues it to the same step.
            changed = {name: value for name, value in changed.items() if name not in ("max_minutes", "max_steps")}
        for name in _OF_A_COMMAND:
            settings.pop(name, None)
        return config_of({**settings, **changed})

    def changes(self, config: TrainConfig) -> list[str]:
        """The settings that differ from the run's record, as "name old -> new"."""
        former = self.record.get("settings", {})
        now = dataclasses.asdict(config)
        fitted = ("max_steps", "max_minutes") if self.record.get("fitted") else ()
        names = [name for name in former if former[name] != now.get(name) and name not in (*_OF_A_COMMAND, *fitted)]
        return [f"--{name} {former[name]} -> {now[name]}" for name in names]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process alone, and remove what killed writers left in it.

        Raises:
            TrainError: if another process trains in it.
        """
        descriptor = self.lock()
        try:
            yield
        finally:
            os.close(descriptor)

    def lock(self) -> int:
        """Make and lock the folder; closing the returned descriptor unlocks it.

        Raises:
            TrainError: if another process trains in it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise TrainError(
                f"another process trains in {self.folder}: wait for it, or choose another --model_dir"
            ) from error
        except OSError:
            LOGGER.warning("the file system of %s knows no locks: do not train twice in it at once", self.folder)
        if self._seen not in (None, self.checkpoints().names()):
            os.close(descriptor)
            raise TrainError(f"another process trained in {self.folder} meanwhile: run the command again")
        remove_abandoned(self.folder)
        for inner in (self.checkpoints(), self.best()):
            remove_abandoned(inner.folder)
            inner.complete()
        return descriptor

    def write(self, **facts: Any) -> None:
        """Add facts to the record and write it, whole or not at all."""
        self.record.update(facts)
        write_json(self.path, {**self.record, SEAL: seal_of(self.record)})

    def set_steps(self, steps: int) -> None:
        """Record the number of steps that the run was fitted to, so that repeating or resuming it takes as many."""
        self.write(settings={**self.record["settings"], "max_steps": steps, "max_minutes": 0.0}, fitted=True)


def require_sound(variables: list[tf.Variable], step: int, checkpoints: Checkpoints) -> None:
    """Stop a run whose weights have diverged, before they are scored or written.

    Raises:
        TrainError: which names the variable, and the last good checkpoint.
    """
    fault = diverged(variables)
    if fault:
        raise TrainError(
            f"the weights have diverged by step {step} ({fault}): lower --learning_rate; {kept(checkpoints)}"
        )


def kept(checkpoints: Checkpoints) -> str:
    """What is left of a run that has failed, as half a sentence."""
    newest = checkpoints.newest
    if newest is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is {newest[0]}, and --resume continues from it"
