"""What a training run left for the exporter."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.errors import ExportError
from unet.card import SEAL, seal_of
from unet.files import read_json
from unet.names import SAVED_MODEL


@dataclass(frozen=True)
class TrainingRun:
    """A folder that train/main.py wrote.

    Attributes:
        folder: the folder.
        settings: of the training.
        held_out: pages kept from training, by the stack's file name.
        repeat: the command that repeats the run.
        versions: of the tools that trained.
        pixel_size_nm: depth, height and width of a pixel of each stack, None for what is not known.
        threshold: of the probability, that the training chose; None if it did not.
        threshold_from: what chose it: "validation" or "training" slices.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    held_out: dict[str, list[int]] = field(default_factory=dict)
    repeat: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    pixel_size_nm: dict[str, list[float | None]] = field(default_factory=dict)
    threshold: float | None = None
    threshold_from: str = ""

    @property
    def for_clients(self) -> dict[str, Any]:
        """What those who segment with the network must know of its training, for the card."""
        chosen = {} if self.threshold is None else {"threshold": self.threshold, "threshold_from": self.threshold_from}
        return {"pixel_size_nm": self.pixel_size_nm, **chosen}

    @property
    def saved_model(self) -> Path:
        """The trained network."""
        return self.folder / SAVED_MODEL

    @classmethod
    def read(cls, folder: Path) -> TrainingRun:
        """Read the run's configuration, if it left one.

        Raises:
            ExportError: it is not the configuration of a run.
        """
        path = folder / "config.json"
        repeat = shlex.join(["python", "train/main.py", "--model_dir", str(folder)])
        if not path.exists():
            return cls(folder, repeat=repeat)
        try:
            values = read_json(path)
        except ValueError as error:
            raise ExportError(f"{path} is not JSON ({error}): take it from the training run again") from error
        if not isinstance(values, dict):
            raise ExportError(f"{path} is not the configuration of a training run: take it from the run again")
        if values.get(SEAL) != seal_of(values):
            raise ExportError(
                f"{path} is not as a run of this version wrote it, so what it held out is not known: take it from the "
                "run again"
            )
        try:
            return cls._of(folder, values, repeat)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ExportError(
                f"{path} lacks or misnames an entry of a training run ({error}): take it from the run again"
            ) from error

    @classmethod
    def _of(cls, folder: Path, values: dict[str, Any], repeat: str) -> TrainingRun:
        trained = dict(values.get("trained", {}))
        chosen_on = str(trained.get("threshold_from", "default"))
        return cls(
            folder,
            dict(values.get("settings", {})),
            {name: [int(page) for page in pages] for name, pages in dict(values.get("held_out", {})).items()},
            str(values.get("repeat", repeat)),
            dict(values.get("versions", {})),
            dict(values.get("pixel_size_nm", {})),
            *((None, "") if chosen_on == "default" else (float(trained["threshold"]), chosen_on)),
        )
