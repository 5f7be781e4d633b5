"""Every setting of a run: one dataclass gives the flags, their help, the record of the run and its repetition."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from unet.errors import UnetError
from unet.geometry import CONTEXT, is_valid_size, valid_size_for
from unet.intensity import WindowChoice, parse_window
from unet.volume import LabelOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

MODES = ("train", "train_and_predict", "predict", "evaluate", "train_and_evaluate", "benchmark")
OPTIMIZERS = ("momentum", "adam")
LOSSES = ("cross_entropy", "cross_entropy+dice")
SCHEDULES = ("exponential", "cosine", "constant")
AMP_DTYPES = ("auto", "float16", "bfloat16")


class ConfigError(UnetError):
    """A flag or a configuration file that cannot be used."""


def _flag(default: Any, text: str, **extra: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, **extra})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run, as given by the flags of ``python train/main.py``."""

    exec_mode: str = _flag("train_and_predict", "what to do", choices=MODES)
    model_dir: str = _flag("result", "folder for everything that the run writes")
    data_dir: str = _flag("data", "folder with NAME-volume.tif and NAME-labels.tif stacks")
    batch_size: int = _flag(1, "windows per step and rank")
    global_batch_size: int = _flag(0, "windows per step over all ranks, instead of --batch_size; 0 leaves it to that")
    max_steps: int = _flag(1000, "training steps")
    max_minutes: float = _flag(0.0, "time the first steps and train only as many as fit into so many minutes; 0: all")
    seed: int = _flag(0, "seed of the weights, the windows, their deformation and dropout")
    weight_decay: float = _flag(0.0005, "decoupled decay of the kernels: a step takes learning rate x this")
    log_every: int = _flag(100, "steps between two lines of the log; after 5 seconds one comes in any case")
    warmup_steps: int = _flag(200, "with --benchmark: those of --max_steps that are not measured")
    learning_rate: float = _flag(0.01, "learning rate at the start")
    momentum: float = _flag(0.99, "momentum of --optimizer momentum")
    decay_steps: int = _flag(5000, "with --lr_schedule exponential: steps between two decays of the learning rate")
    decay_rate: float = _flag(0.95, "with --lr_schedule exponential: factor of each decay")
    augment: bool = _flag(False, "deform the training windows at random")
    benchmark: bool = _flag(False, "measure images per second of what the mode does, instead of doing it")
    use_amp: bool = _flag(False, "mixed precision: float16 with loss scaling on a GPU, bfloat16 on a CPU")
    amp_dtype: str = _flag("auto", "number format of --use_amp", choices=AMP_DTYPES)
    loss_scale: float = _flag(0.0, "fixed loss scale of float16; 0 adapts it")
    xla: bool = _flag(False, "compile with XLA (about half as fast on a CPU)")
    base_filters: int = _flag(64, "filters of the first level")
    dropout: float = _flag(0.5, "share dropped at the two deepest contracting levels")
    tile_size: int = _flag(572, "input size of a training window, 188 + 16k; its label is 184 smaller")
    optimizer: str = _flag("momentum", "how weights follow gradients", choices=OPTIMIZERS)
    lr_schedule: str = _flag(
        "exponential", "how the learning rate falls; cosine reaches 0 at --max_steps", choices=SCHEDULES
    )
    lr_warmup_steps: int = _flag(0, "steps over which the learning rate rises from 0")
    loss: str = _flag("cross_entropy", "what is minimised", choices=LOSSES)
    membrane_weight: float = _flag(1.0, "cost of an error on a membrane pixel; other pixels cost 1")
    border_weight: float = _flag(0.0, "extra cost of membrane between two close cells (the paper's w0 is 10)")
    window: str = _flag(
        "", "intensities that become 0 and 255, as `stack`, `slice` or 'LOW HIGH'; as for serve/client.py"
    )
    membrane_value: int = _flag(-1, "the labels' value of membrane; -1 takes 0, if its share is plausible")
    membrane_width: int = _flag(
        0, "the labels are ids of cells; membrane is where neighbours differ, so many pixels wide; 0: they are masks"
    )
    crossvalidation_idx: int = _flag(-1, "hold out fold 0 to 4 of each stack from training; -1 trains on all slices")
    evaluate_every: int = _flag(0, "steps between two measurements of the held-out Dice while training; 0 for none")
    checkpoint_every: int = _flag(500, "steps between two checkpoints; the last step always writes one")
    resume: bool = _flag(False, "go on from the newest checkpoint in --model_dir, or begin where there is none")
    tta: bool = _flag(False, "predict and evaluate with the mean over mirrorings and quarter turns")
    fp16_compression: bool = _flag(False, "send gradients between ranks as float16")
    preview_augmentation: str = _flag("", "write a picture of the first training windows to this PNG, and do no more")

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"--{name} {getattr(self, name)} is not one of {', '.join(choices)}")
        for name in ("batch_size", "max_steps", "log_every", "base_filters", "checkpoint_every", "decay_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if self.global_batch_size < 0:
            raise ConfigError(f"--global_batch_size is {self.global_batch_size}; it must be positive, or 0 for none")
        if not is_valid_size(self.tile_size):
            nearest = valid_size_for(max(1, self.tile_size - CONTEXT))
            raise ConfigError(f"--tile_size {self.tile_size} is not 188 + 16k; the next such size is {nearest}")
        if not self.max_minutes >= 0:
            raise ConfigError(f"--max_minutes is {self.max_minutes:g}; it must be positive, or 0 for no limit")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"--dropout is {self.dropout}; it must be at least 0 and below 1")
        if not -1 <= self.crossvalidation_idx < 5:
            raise ConfigError(f"--crossvalidation_idx is {self.crossvalidation_idx}; it must be -1 or a fold, 0 to 4")

    def for_ranks(self, ranks: int) -> TrainConfig:
        """The same settings with `batch_size` as each of so many ranks takes it.

        Raises:
            ConfigError: if the global batch cannot be shared out evenly.
        """
        if self.global_batch_size == 0:
            return self
        if self.global_batch_size % ranks:
            raise ConfigError(
                f"--global_batch_size {self.global_batch_size} cannot be shared out evenly over {ranks} ranks: choose "
                f"a multiple of {ranks}, or another number of ranks"
            )
        return dataclasses.replace(self, batch_size=self.global_batch_size // ranks)

    @property
    def window_choice(self) -> WindowChoice:
        """How the intensities become 8 bits."""
        return parse_window(self.window.split())

    @property
    def label_options(self) -> LabelOptions:
        """How the values of the label stacks are understood."""
        return LabelOptions.of(dataclasses.asdict(self))

    @property
    def repeat_command(self) -> str:
        """The command that repeats this run from its written configuration."""
        return shlex.join(["python", "train/main.py", "--config", str(Path(self.model_dir) / "config.json")])


_CHOICES: dict[str, tuple[str, ...]] = {
    f.name: f.metadata["choices"] for f in dataclasses.fields(TrainConfig) if "choices" in f.metadata
}


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that the flags ask for, over that of ``--config FILE`` where given."""
    parser = argparse.ArgumentParser(
        prog="train/main.py",
        description="Train a U-Net on electron-microscopy slices, on one process or under horovodrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--config", help="JSON file of a former run whose settings are taken where no flag says otherwise"
    )
    hints = get_type_hints(TrainConfig)
    for field in dataclasses.fields(TrainConfig):
        text = field.metadata["help"]
        if hints[field.name] is bool:
            parser.add_argument(f"--{field.name}", action="store_true", default=field.default, help=text)
            parser.add_argument(
                f"--no-{field.name}",
                dest=field.name,
                action="store_false",
                default=field.default,
                help=argparse.SUPPRESS,
            )
        else:
            choices = field.metadata.get("choices")
            parser.add_argument(
                f"--{field.name}", type=hints[field.name], default=field.default, choices=choices, help=text
            )
    chosen = parser.parse_args(argv)
    if chosen.config is not None:
        parser.set_defaults(**read_config(chosen.config))
        chosen = parser.parse_args(argv)
    values = vars(chosen)
    del values["config"]
    return TrainConfig(**values)


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in a run's ``config.json``.

    Raises:
        ConfigError: if the file is not such a record.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))["settings"]
        unknown = set(values) - {field.name for field in dataclasses.fields(TrainConfig)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the config.json of a training run: {error}") from error
    if unknown:
        raise ConfigError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    return dict(values)
