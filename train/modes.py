"""What the trainer's modes do, put together from the parts."""

from __future__ import annotations

import contextlib
import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from tqdm import tqdm

from train.charts import augmentation_sheet, learning_curve, threshold_curve
from train.checkpoints import Checkpoints
from train.cluster import Cluster, join_cluster
from train.config import ConfigError, TrainConfig
from train.evaluation import average_over_symmetries, make_predictor
from train.input.dataset import TEST_IMAGES, Slice, find_pairs, fold_of, load_slices, windows_of
from train.log import RunLog
from train.loop import describe_precision, precision_of, train
from train.model.losses import border_weights
from train.model.network import build_unet
from train.model.saved_model import write_saved_model
from train.model.schedule import CONFIG_FILE, as_fitted
from train.throughput import measure
from unet import __version__
from unet.errors import say
from unet.files import write_json
from unet.intensity import find_windows
from unet.scores import score_stack
from unet.volume import StackReader, StackWriter

if TYPE_CHECKING:
    from train.evaluation import Predictor


def run(config: TrainConfig) -> int:
    """Run the mode that the configuration names; returns the exit code."""
    cluster = join_cluster()
    config = config.for_ranks(cluster.size)
    if config.preview_augmentation:
        if cluster.is_first:
            _preview(config)
        return 0
    log = RunLog(config.model_dir, active=cluster.is_first)
    with contextlib.closing(log):
        return _run_mode(config, cluster, log)


def _run_mode(config: TrainConfig, cluster: Cluster, log: RunLog) -> int:
    if config.benchmark or config.exec_mode == "benchmark":
        _benchmark(config, cluster, log)
        return 0
    if config.exec_mode in ("train", "train_and_predict", "train_and_evaluate"):
        interrupted = _train(config, cluster, log)
        if interrupted:
            return 0
    if not cluster.is_first:
        return 0
    if config.exec_mode in ("predict", "train_and_predict"):
        _predict(config, log)
    if config.exec_mode in ("evaluate", "train_and_evaluate"):
        _evaluate(config, log)
    return 0


def _preview(config: TrainConfig) -> None:
    """A contact sheet of the windows that training would begin with."""
    windows = windows_of(config, labelled_slices(config))
    path = Path(config.preview_augmentation)
    augmentation_sheet(windows, path)
    say(f"the first training windows, with the membrane of their labels: {path}")


def _benchmark(config: TrainConfig, cluster: Cluster, log: RunLog) -> None:
    """Measure what the mode would do: training, inference, or both."""
    slices = labelled_slices(config)
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


def _train(config: TrainConfig, cluster: Cluster, log: RunLog) -> bool:
    config, fitted = as_fitted(config)
    training, held_out = _split(config)
    if cluster.is_first:
        write_json(
            Path(config.model_dir) / CONFIG_FILE,
            {
                "settings": dataclasses.asdict(config),
                "fitted": fitted,
                "repeat": config.repeat_command,
                "held_out": _held_out_pages(config),
                "ranks": cluster.size,
                "precision": precision_of(config),
                "versions": {"unet": __version__, "tensorflow": version("tensorflow"), "numpy": version("numpy")},
            },
        )
    log.event(
        "PARAMETER",
        f"training on {len(training)} slices, {len(held_out)} held out, {cluster.size} ranks x {config.batch_size} "
        f"windows of {config.tile_size}, {config.base_filters} filters, {describe_precision(config)}",
        **dataclasses.asdict(config),
    )
    costs = [_with_cost(config, item) for item in training]
    result = train(config, cluster, log, costs, held_out)
    if cluster.is_first:
        learning_curve(config.model_dir)
    if cluster.is_first and not result.interrupted:
        write_saved_model(result.model, Path(config.model_dir) / "saved_model")
        log.event(
            "SUMMARY", f"trained {result.step} steps: {Path(config.model_dir) / 'saved_model'}", steps=result.step
        )
    elif result.interrupted:
        log.event(result.step, f"stopped after step {result.step}, which is saved: go on with --resume")
    return result.interrupted


def _split(config: TrainConfig) -> tuple[list[Slice], list[Slice]]:
    """The slices to train on and those held out, by the fold of each stack."""
    training: list[Slice] = []
    held_out: list[Slice] = []
    for pair in find_pairs(config.data_dir):
        slices = [
            Slice(name, image, label, np.ones(label.shape, np.float32))
            for name, image, label in load_slices([pair], config.label_options, config.window_choice)
        ]
        fold = fold_of(len(slices), config.crossvalidation_idx) if config.crossvalidation_idx >= 0 else range(0)
        for index, item in enumerate(slices):
            (held_out if index in fold else training).append(item)
    if not training:
        raise ConfigError(f"no slice of {config.data_dir} is left to train on: --crossvalidation_idx needs more slices")
    return training, held_out


def labelled_slices(config: TrainConfig) -> list[Slice]:
    """The slices to train on, with what an error at each of their pixels costs.

    Raises:
        DataError: if there are none.
    """
    return [_with_cost(config, item) for item in _split(config)[0]]


def _held_out_pages(config: TrainConfig) -> dict[str, list[int]]:
    """The pages of each stack that training does not see."""
    if config.crossvalidation_idx < 0:
        return {}
    pages = {}
    for images, _ in find_pairs(config.data_dir):
        with StackReader(images) as reader:
            pages[images.name] = list(fold_of(len(reader), config.crossvalidation_idx))
    return pages


def _with_cost(config: TrainConfig, item: Slice) -> Slice:
    cost = np.where(item.label == 0, config.membrane_weight, 1).astype(np.float32)
    if config.border_weight > 0:
        cost += border_weights(item.label, config.border_weight)
    return dataclasses.replace(item, cost=cost)


def _trained_predictor(config: TrainConfig) -> Predictor:
    model = build_unet(config.base_filters, precision=precision_of(config))
    Checkpoints(config.model_dir, model=model).restore(partial=True)
    predict = make_predictor(model)
    return average_over_symmetries(predict) if config.tta else predict


def _predict(config: TrainConfig, log: RunLog) -> None:
    """Segment `test-volume.tif` of the data folder into ``model_dir/eval``."""
    predict = _trained_predictor(config)
    source = Path(config.data_dir) / TEST_IMAGES
    target = Path(config.model_dir) / "eval" / "test-probability.tif"
    with StackReader(source) as reader:
        windows = find_windows(reader, config.window_choice)
        with StackWriter(target, reader, np.dtype(np.float32)) as writer:
            for page in tqdm(range(len(reader)), unit="slice", disable=None):
                writer.append(predict(windows.apply(page, reader[page])))
    log.event("SUMMARY", f"probabilities of {source}: {target}", predicted=str(target))


def _evaluate(config: TrainConfig, log: RunLog) -> None:
    """Score the held-out slices of the fold, or all slices where none is held out."""
    training, held_out = _split(config)
    predict = _trained_predictor(config)
    chosen = held_out or training
    by_shape: dict[tuple[int, ...], list[Slice]] = {}
    for item in chosen:
        by_shape.setdefault(item.label.shape, []).append(item)
    for shape, items in by_shape.items():
        probability: npt.NDArray[np.float32] = np.stack([predict(item.image) for item in items])
        scores = score_stack(probability, np.stack([item.label for item in items]))
        kind = "held-out" if held_out else "training"
        target = Path(config.model_dir) / "eval" / f"scores-{shape[0]}x{shape[1]}.json"
        log.event(
            "SUMMARY",
            f"{len(items)} {kind} slices of {shape[0]} x {shape[1]}: {scores}",
            **scores.as_dict(),
        )
        write_json(target, {"slices": len(items), "held_out": bool(held_out), **scores.as_dict()})
        threshold_curve(scores, target)
    tf.keras.backend.clear_session()
