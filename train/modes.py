"""What the trainer's modes do, put together from the parts."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.charts import augmentation_sheet, learning_curve, threshold_curve
from train.config import TrainConfig, config_of
from train.errors import TrainError
from train.evaluation import average_over_networks, average_over_symmetries, make_predictor
from train.input.dataset import windows_of
from train.input.pairs import find_test
from train.input.split import load_data
from train.loop import TrainingLoop
from train.model.initial import load_initial
from train.model.network import build_unet
from train.model.saved_model import write_saved_model
from train.run.cluster import Cluster, join_cluster
from train.run.folder import Run
from train.run.log import RunLog
from train.run.progress import progress, watched
from train.run.room import require_room
from train.scoring import tally, training_scores
from train.throughput import measure
from train.trainer import Trainer, describe_precision, precision_of
from unet import __version__
from unet.errors import EXIT_INTERRUPTED, say, warn
from unet.files import write_json
from unet.intensity import find_windows
from unet.volume import StackWriter, open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from train.evaluation import Predictor
    from train.input.split import Data
    from train.input.store import Slice


# Slices that a run's threshold comes from, by `Run.threshold_from`.
CHOSEN_ON = {"validation": "the validation slices", "training": "training slices", "default": "no slices"}


def run(given: Mapping[str, Any]) -> int:
    """Run the mode that the given settings name; returns the exit code."""
    cluster = join_cluster()
    folder = Run(config_of(given).model_dir)
    config = cluster.from_first(lambda: folder.configure(given)).for_ranks(cluster.size)
    if config.preview_augmentation:
        if cluster.is_first:
            _preview(config)
        return 0
    with contextlib.closing(RunLog(config.model_dir, active=cluster.is_first)) as log:
        if config.benchmark or config.exec_mode == "benchmark":
            _benchmark(config, cluster, log)
            return 0
        if config.trains:
            stopped_by = _train(config, cluster, folder, log)
            if stopped_by:
                return EXIT_INTERRUPTED if stopped_by == signal.SIGINT else 0
        if cluster.is_first:
            if config.exec_mode in ("predict", "train_and_predict"):
                _predict(config, folder, log)
            if config.exec_mode in ("evaluate", "train_and_evaluate"):
                _evaluate(config, folder, log)
    return 0


def _preview(config: TrainConfig) -> None:
    """A contact sheet of the windows that training would begin with."""
    windows = windows_of(config, load_data(config).training)
    path = Path(config.preview_augmentation)
    augmentation_sheet(windows, path)
    say(f"the first training windows, with the membrane of their labels: {path}")


def _benchmark(config: TrainConfig, cluster: Cluster, log: RunLog) -> None:
    """Measure what the mode would do: training, inference, or both."""
    slices = load_data(config).training
    kinds = {"train": (True,), "predict": (False,), "evaluate": (False,)}.get(config.exec_mode, (True, False))
    for training in kinds:
        name = "training" if training else "inference"
        figures = measure(config, cluster, slices, training=training)
        log.event(
            "SUMMARY",
            f"{name}: {cluster.size} ranks x {config.batch_size} windows of {config.tile_size}, "
            f"{config.base_filters} filters, {precision_of(config)}: {figures}",
            **{f"{name}_{key}": value for key, value in figures.as_dict().items()},
        )


def _train(config: TrainConfig, cluster: Cluster, run: Run, log: RunLog) -> int:
    """Check everything, lock the folder, train, and write the SavedModel; the signal that stopped it, 0 for none."""
    data = load_data(config, run.record if config.resume else None)
    trainer = Trainer(config, cluster)
    first = cluster.from_first(lambda: _starting_point(config, run, trainer))
    with _locked(cluster, run):
        log.rewind(first)
        if cluster.is_first:
            for change in run.changes(config) if first else ():
                say(f"continued with another setting: {change}")
            run.write(**_facts(config, cluster, data))
        log.event(
            "PARAMETER",
            f"training on {len(data.training)} slices, {len(data.validation)} for validation, {len(data.held_out)} "
            f"held out, {cluster.size} ranks x {config.batch_size} windows of {config.tile_size}, "
            f"{config.base_filters} filters, {describe_precision(config)}",
            **dataclasses.asdict(config),
        )
        trainer.synchronise()
        result = TrainingLoop(trainer, run, log, data, first).run()
        if cluster.is_first:
            learning_curve(config.model_dir)
            if result.stopped_by:
                text = f"stopped after step {result.step}, which is saved: continue with --resume"
                log.event(result.step, text)
            else:
                _finish(config, run, log, result.step, data)
        return result.stopped_by


def _starting_point(config: TrainConfig, run: Run, trainer: Trainer) -> int:
    """Load what the run continues or starts from, and check all that can be checked; the steps done so far."""
    if config.exec_mode == "train_and_predict":
        open_volume(find_test(config.data_dir)).close()
    require_room(run, trainer.model.variables, trainer.variables)
    checkpoints = run.checkpoints(model=trainer.model, optimizer=trainer.optimizer)
    if config.resume and checkpoints.names():
        return checkpoints.restore()
    if config.init_from:
        say(f"starting from {load_initial(config.init_from, trainer.model)}")
    return 0


@contextlib.contextmanager
def _locked(cluster: Cluster, run: Run) -> Iterator[None]:
    """The run's folder locked by the first rank, for all."""
    with contextlib.ExitStack() as stack:

        def lock() -> None:
            stack.enter_context(run.locked())

        cluster.from_first(lock)
        yield


def _facts(config: TrainConfig, cluster: Cluster, data: Data) -> dict[str, Any]:
    return {
        "settings": dataclasses.asdict(config),
        "repeat": config.repeat_command,
        **data.record(),
        "ranks": cluster.size,
        "precision": precision_of(config),
        "versions": {"unet": __version__, "tensorflow": version("tensorflow"), "numpy": version("numpy")},
    }


def _finish(config: TrainConfig, run: Run, log: RunLog, step: int, data: Data) -> None:
    """Write the SavedModel of the best weights, and what they are, into the run's record."""
    model = build_unet(config.base_filters)
    weights, weights_step = run.load_trained(model)
    target = run.folder / "saved_model"
    write_saved_model(model, target)
    best = run.best().newest
    chosen_on = None if best else training_scores(make_predictor(model), data.training)
    if chosen_on and chosen_on.is_blank:
        warn(
            "at each threshold the network calls all pixels membrane, or none: it was trained too shortly, or its "
            "training collapsed; try more --max_steps, --clip_norm 1, or a lower --learning_rate"
        )
    scores = {name: value for name, value in (best[1] if best else {}).items() if name not in ("step", "threshold")}
    run.write(
        trained={
            "steps": step,
            "weights": weights,
            "weights_step": weights_step,
            "threshold": chosen_on.best_threshold if chosen_on else run.threshold,
            "threshold_from": "validation" if best else "training",
            "validation_scores": scores,
        }
    )
    log.event(
        "SUMMARY",
        f"trained {step} steps: {target} has the {weights} weights, of step {weights_step}; threshold {run.threshold}, "
        f"chosen on {CHOSEN_ON[run.threshold_from]}",
        steps=step,
        weights_step=weights_step,
        threshold=run.threshold,
    )


def trained_predictor(config: TrainConfig, runs: Sequence[Run]) -> Predictor:
    """The mean of the runs' networks, the first of which ``config`` is about.

    Raises:
        TrainError: if a run has no weights yet.
    """
    predictors = []
    for run in runs:
        own = config if run is runs[0] else config_of(run.record["settings"])
        model = build_unet(own.base_filters, precision=precision_of(own))
        run.load_trained(model)
        predictors.append(make_predictor(model))
    predict = average_over_networks(predictors)
    return average_over_symmetries(predict) if config.tta else predict


def _with_others(config: TrainConfig, run: Run) -> list[Run]:
    """The run and those of ``--also``, which see the same intensities.

    Raises:
        TrainError: a folder holds no run, or its network saw other intensities.
    """
    others = [Run(folder.strip()) for folder in config.also.split(",") if folder.strip()]
    for other in others:
        if not other.record:
            raise TrainError(f"{other.folder} holds no training run: name the --model_dir of one with --also")
        window = config_of(other.record["settings"]).window
        if window != config.window:
            raise TrainError(
                f"the network in {other.folder} was trained with --window '{window}', the one in {run.folder} with "
                f"'{config.window}': their mean needs the same intensities"
            )
    return [run, *others]


def _require_held_out(runs: Sequence[Run]) -> None:
    """Refuse to call slices held out that one of the networks was trained on."""
    for other in runs[1:]:
        if other.held_out != runs[0].held_out:
            raise TrainError(
                f"{other.folder} held out {other.held_out or 'nothing'}, and {runs[0].folder} {runs[0].held_out}: "
                "scores of their mean would be of slices that one of them has seen"
            )


def _predict(config: TrainConfig, run: Run, log: RunLog) -> None:
    """Segment `test-volume.tif` of the data folder into ``model_dir/eval``."""
    source = find_test(config.data_dir)
    predict = trained_predictor(config, _with_others(config, run))
    target = run.folder / "eval" / "test-probability.tif"
    with open_volume(source) as reader:
        with progress(None, f"looking through {source.name}", passing=True) as shown:
            windows = find_windows(reader, config.window_choice, shown.advance)
        with StackWriter(target, reader, np.dtype(np.float32)) as writer:
            for page in watched(range(len(reader)), f"slices of {source.name} segmented"):
                writer.append(predict(windows.apply(page, reader[page])))
    log.event("SUMMARY", f"probabilities of {source}: {target}", predicted=str(target))


def _evaluate(config: TrainConfig, run: Run, log: RunLog) -> None:
    """Score the slices that the run held out, or those that it was trained on if it held out none."""
    runs = _with_others(config, run)
    if run.held_out:
        _require_held_out(runs)
    data = load_data(config, run.record)
    predict = trained_predictor(config, runs)
    by_shape: dict[tuple[int, ...], list[Slice]] = {}
    for item in data.held_out or data.training:
        by_shape.setdefault(item.label.shape, []).append(item)
    for (height, width), items in by_shape.items():
        scores = tally(predict, watched(items, "slices scored"))
        kind = "held-out" if data.held_out else "training"
        target = run.folder / "eval" / f"scores-{height}x{width}.json"
        kept = {"held_out": bool(data.held_out), "networks": len(runs)}
        record = {"slices": len(items), **kept, **scores.as_dict(run.threshold)}
        text = (
            "at the threshold {threshold} that {by} chose: V_rand {v_rand_at_threshold:.4f}, V_info "
            "{v_info_at_threshold:.4f}, Dice of the membrane {dice:.4f}, pixel error {pixel_error:.4f}; the "
            "challenge's figures, each at the threshold that is best on these very slices: V_rand {best_v_rand:.4f} "
            "(at {best_v_rand_threshold}), V_info {best_v_info:.4f} (at {best_v_info_threshold})"
        ).format(by=CHOSEN_ON[run.threshold_from], **record)
        log.event("SUMMARY", f"{len(items)} {kind} slices of {height} x {width}, {text}", **record)
        write_json(target, record)
        threshold_curve(scores, run.threshold, target)
