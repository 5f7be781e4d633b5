"""Every setting of a run: one dataclass gives the flags, their help, the record of the run and its repetition."""

from __future__ import annotations

import argparse
import dataclasses
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.errors import TrainError
from unet.config import FlagParser, add_flags, fits, setting
from unet.files import read_json
from unet.geometry import CONTEXT, is_valid_size, valid_size_for
from unet.intensity import WindowChoice, parse_window
from unet.volume import LabelOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MODES = ("train", "train_and_predict", "predict", "evaluate", "train_and_evaluate", "benchmark")
TRAINING_MODES = ("train", "train_and_predict", "train_and_evaluate")
OPTIMIZERS = ("momentum", "adam")
LOSSES = ("cross_entropy", "cross_entropy+dice")
SCHEDULES = ("exponential", "cosine", "constant")
AMP_DTYPES = ("auto", "float16", "bfloat16")
TRAINED_PARTS = ("everything", "decoder")
FOLDS = 5
# The settings that a run keeps from its first step to its last score.
FACTS = (
    *("seed", "use_amp", "amp_dtype", "base_filters", "optimizer", "init_from", "train_part"),
    *("crossvalidation_idx", "validation_share", "membrane_value", "membrane_width", "ignore_label"),
    "window",
)

# Starting from a trained network, steps of this share of the usual learning rate keep what it knows.
_FINE_TUNING = 0.1
_COUNTS = ("batch_size", "max_steps", "log_every", "base_filters", "checkpoint_every", "decay_steps")
_NOT_NEGATIVE = (
    *("global_batch_size", "evaluate_every", "patience", "warmup_steps", "lr_warmup_steps", "weight_decay"),
    *(
        "learning_rate",
        "momentum",
        "membrane_weight",
        "border_weight",
        "max_minutes",
        "membrane_width",
        "loss_scale",
        "clip_norm",
    ),
)
_BOUNDS: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_COUNTS, (1, math.inf)),
    **dict.fromkeys(_NOT_NEGATIVE, (0, math.inf)),
    # Each layer draws its weights from a seed of its own, a thousand to a run; TensorFlow takes 31 bits.
    "seed": (0, 2_000_000),
}


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run, as given by the flags of ``python train/main.py``."""

    exec_mode: str = setting("train_and_predict", "what to do", choices=MODES)
    model_dir: str = setting("result", "folder for everything that the run writes")
    data_dir: str = setting("data", "folder with NAME-volume.tif and NAME-labels.tif stacks")
    batch_size: int = setting(1, "windows per step and rank")
    global_batch_size: int = setting(0, "windows per step over all ranks, instead of --batch_size; 0 leaves it to that")
    max_steps: int = setting(1000, "training steps")
    max_minutes: float = setting(0.0, "time the first steps and train only as many as fit into so many minutes; 0: all")
    seed: int = setting(0, "seed of the weights, the windows, their deformation and dropout")
    weight_decay: float = setting(0.0005, "decoupled decay of the kernels: a step takes learning rate x this")
    log_every: int = setting(100, "steps between two lines of the log; after 5 seconds one comes in any case")
    warmup_steps: int = setting(200, "with --benchmark: steps of --max_steps that are not measured")
    learning_rate: float = setting(0.01, "learning rate at the start; a tenth of it with --init_from")
    momentum: float = setting(0.99, "momentum of --optimizer momentum")
    clip_norm: float = setting(0.0, "a step whose gradients are together longer than this shortens them to it; 0: none")
    decay_steps: int = setting(5000, "with --lr_schedule exponential: steps between two decays of the learning rate")
    decay_rate: float = setting(0.95, "with --lr_schedule exponential: factor of each decay")
    augment: bool = setting(False, "deform the training windows at random")
    benchmark: bool = setting(False, "measure images per second of what the mode does, instead of doing it")
    use_amp: bool = setting(False, "mixed precision: float16 with loss scaling on a GPU, bfloat16 on a CPU")
    amp_dtype: str = setting("auto", "number format of --use_amp", choices=AMP_DTYPES)
    loss_scale: float = setting(0.0, "fixed loss scale of float16; 0 adapts it")
    xla: bool = setting(False, "compile with XLA (about half as fast on a CPU)")
    base_filters: int = setting(64, "filters of the first level")
    dropout: float = setting(0.5, "share dropped at the two deepest contracting levels")
    tile_size: int = setting(572, "input size of a training window, 188 + 16k; its label is 184 smaller")
    optimizer: str = setting("momentum", "how weights follow gradients", choices=OPTIMIZERS)
    lr_schedule: str = setting(
        "exponential", "how the learning rate falls; cosine reaches 0 at --max_steps", choices=SCHEDULES
    )
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises from 0")
    loss: str = setting("cross_entropy", "what is minimised", choices=LOSSES)
    membrane_weight: float = setting(1.0, "cost of an error on a membrane pixel; other pixels cost 1")
    border_weight: float = setting(0.0, "extra cost of membrane between two close cells (the paper's w0 is 10)")
    window: str = setting(
        "", "intensities that become 0 and 255, as `stack`, `slice` or 'LOW HIGH'; as for serve/client.py"
    )
    membrane_value: int = setting(-1, "the labels' value of membrane; -1 takes 0, if its share is plausible")
    membrane_width: int = setting(
        0, "the labels are ids of cells; membrane is where neighbours differ, so many pixels wide; 0: they are masks"
    )
    ignore_label: int = setting(-1, "the labels' value of pixels that nobody annotated; they count nowhere; -1: none")
    init_from: str = setting("", "start from this trained network: a run's folder, a checkpoint, or exported artefacts")
    train_part: str = setting("everything", "what is trained: all, or the decoder", choices=TRAINED_PARTS)
    crossvalidation_idx: int = setting(-1, "hold out fold 0 to 4 of each stack for scores; -1 holds out none")
    validation_share: float = setting(
        0.1, "share of the other slices that chooses the best weights and the threshold; 0 trains on them too"
    )
    evaluate_every: int = setting(0, "steps between two validations; 0: a tenth of the run, 100 or more")
    patience: int = setting(0, "validations in a row without better weights that end the run; 0: none do")
    checkpoint_every: int = setting(500, "steps between two checkpoints; the last step always writes one")
    resume: bool = setting(False, "continue from the newest checkpoint in --model_dir, or start if there is none")
    tta: bool = setting(False, "predict and evaluate with the mean over mirrorings and quarter turns")
    also: str = setting(
        "", "predict and evaluate with the mean of this network and of those of other runs: their folders, with commas"
    )
    fp16_compression: bool = setting(False, "send gradients between ranks as float16")
    preview_augmentation: str = setting("", "write a picture of the first training windows to this PNG, then stop")

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise TrainError(f"--{name} {getattr(self, name)} is not one of {', '.join(choices)}")
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            if not least <= value <= most:
                upto = f"at most {most}" if value > most else f"at least {least}"
                raise TrainError(f"--{name} is {value}; it must be {upto}")
        for name in ("dropout", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                raise TrainError(f"--{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.patience and not self.validation_share:
            raise TrainError("--patience waits for better scores of a validation part: give it a --validation_share")
        if not is_valid_size(self.tile_size):
            nearest = valid_size_for(max(1, self.tile_size - CONTEXT))
            raise TrainError(f"--tile_size {self.tile_size} is not 188 + 16k; the next such size is {nearest}")
        if not -1 <= self.crossvalidation_idx < FOLDS:
            raise TrainError(f"--crossvalidation_idx is {self.crossvalidation_idx}; it must be -1 or a fold, 0 to 4")

    @property
    def trains(self) -> bool:
        """Whether the mode trains, and does not measure."""
        return self.exec_mode in TRAINING_MODES and not self.benchmark and not self.preview_augmentation

    def steps_between_validations(self, steps: int) -> int:
        """``evaluate_every``, or what it stands for in a run of so many steps, which may have been fitted to a time."""
        return self.evaluate_every or max(100, -(-steps // 10))

    def for_ranks(self, ranks: int) -> TrainConfig:
        """The same settings with `batch_size` as each of so many ranks takes it.

        Raises:
            TrainError: if the global batch cannot be shared out evenly.
        """
        if self.global_batch_size == 0:
            return self
        if self.global_batch_size % ranks:
            raise TrainError(
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


_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_CHOICES: dict[str, tuple[str, ...]] = {
    name: field.metadata["choices"] for name, field in _FIELDS.items() if field.metadata["choices"]
}


def default_of(name: str) -> Any:
    """The default of a setting."""
    return _FIELDS[name].default


def parse_flags(argv: Sequence[str] | None = None, *, minutes: bool = False) -> dict[str, Any]:
    """The settings that flags give, or ``--config FILE`` where no flag does; those that neither gives are left out.

    Args:
        argv: the command line.
        minutes: whether ``--minutes`` is a flag, from which `train.input.fitting.settings_of` makes settings.
    """
    parser = FlagParser(
        prog="train/main.py",
        description="Train a U-Net on electron-microscopy slices, on one process or under horovodrun.",
    )
    parser.add_argument(
        "--config", help="JSON file of a former run whose settings are used where no flag says otherwise"
    )
    if minutes:
        parser.add_argument(
            "--minutes",
            type=float,
            help="of training: what no flag gives follows from data and machine, and as many steps as fit",
        )
    add_flags(parser, TrainConfig)
    # What the namespace holds already gets no default, so None is left where no flag was given.
    chosen = vars(parser.parse_args(argv, argparse.Namespace(config=None, minutes=None, **dict.fromkeys(_FIELDS))))
    path = chosen.pop("config")
    if chosen["minutes"] is not None and not chosen["minutes"] > 0:
        parser.error("--minutes must be positive")
    given = {} if path is None else read_settings(path)
    return {**given, **{name: value for name, value in chosen.items() if value is not None}}


def config_of(given: Mapping[str, Any]) -> TrainConfig:
    """The configuration of the given settings and the defaults of all others."""
    settings = dict(given)
    if settings.get("init_from") and "learning_rate" not in settings:
        settings["learning_rate"] = default_of("learning_rate") * _FINE_TUNING
    return TrainConfig(**settings)


def parse_config(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that the flags ask for, over that of ``--config FILE`` where given."""
    return config_of(parse_flags(argv))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a run's ``config.json``.

    Raises:
        TrainError: if the file is not such a record.
    """
    try:
        values = {str(name): value for name, value in dict(read_json(path)["settings"]).items()}
        unknown = set(values) - set(_FIELDS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{path} is not the config.json of a training run: {error}") from error
    if unknown:
        raise TrainError(f"{path} has settings that this version does not know: {', '.join(sorted(unknown))}")
    for name, value in values.items():
        if not fits(TrainConfig, name, value):
            raise TrainError(f"{path} has {value!r:.40} for {name}: correct it, or leave it out for the default")
    try:
        config_of(values)
    except TrainError as error:
        raise TrainError(f"{path} has settings that cannot be: {error}") from error
    return values
