"""Ratios of training speed, each from one interleaved run: ``python train/compare_speed.py [flags of main.py]``.

* our step against Keras' own ``fit``: the same network, batch, loss, optimizer, precision and input;
* the arithmetic of our step's convolutions against TensorFlow's product of large matrices in the same format: how much
  of the processor training uses;
* bfloat16 against float32, where the processor has its instructions;
* two ranks against one process with the same global batch and all cores;
* what cutting a training window costs, with and without augmentation.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.config import TrainConfig, parse_config
from train.errors import TrainError
from unet.errors import command, say
from unet.files import write_json
from unet.machine import cpu_amp_dtype, machine
from unet.measure import interleave, markdown, ratios
from unet.processes import child

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from train.input.store import Slice

_MATRIX_SIDE = 2048
MAIN = Path(__file__).with_name("main.py")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """One figure over another, round by round."""

    name: str
    unit: str
    numerators: Sequence[float]
    denominators: Sequence[float]

    @property
    def rounds(self) -> list[float]:
        """The ratio in each round."""
        return ratios(self.numerators, self.denominators)

    @property
    def median(self) -> float:
        """The ratio in the middle round."""
        return statistics.median(self.rounds)

    def cells(self) -> list[str]:
        """A line of the table."""
        over, under = statistics.median(self.numerators), statistics.median(self.denominators)
        spread = f"{self.rounds[0]:.3f} to {self.rounds[-1]:.3f}"
        return [self.name, f"{over:.4g} / {under:.4g} {self.unit}", f"{self.median:.3f}", spread]


def our_steps(config: TrainConfig, slices: Sequence[Slice], steps: int) -> Callable[[], float]:
    """Runs that many of our training steps; seconds a step."""
    from train.input.dataset import windows_of
    from train.run.cluster import Cluster
    from train.trainer import Trainer

    trainer = Trainer(config, Cluster())
    batches = iter(windows_of(config, slices).batches(0, config.batch_size, config.batch_size))
    trainer.step(0, next(batches)).numpy()

    def run() -> float:
        started = time.perf_counter()
        for number in range(steps):
            trainer.step(number, next(batches)).numpy()
        return (time.perf_counter() - started) / steps

    return run


def keras_steps(config: TrainConfig, slices: Sequence[Slice], steps: int) -> Callable[[], float]:
    """Runs that many steps of Keras' own loop on the same network and windows; seconds a step."""
    import tensorflow as tf

    from train.input.dataset import windows_of
    from train.model.network import build_unet
    from train.trainer import make_optimizer, precision_of

    precision = precision_of(config)
    model = build_unet(config.base_filters, config.dropout, precision=precision, seed=config.seed)
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(make_optimizer(config, precision), loss)
    batches = windows_of(config, slices).batches(0, config.batch_size, config.batch_size)
    clock = _StepClock()
    model.fit(batches, steps_per_epoch=1, verbose=0)

    def run() -> float:
        # Each call starts its input anew, which is not timed: the clock runs from the end of the first step.
        model.fit(batches, steps_per_epoch=steps + 1, verbose=0, callbacks=[clock.callback])
        return clock.seconds / steps

    return run


class _StepClock:
    """Seconds from the end of the first step of an epoch to its end."""

    def __init__(self) -> None:
        import tensorflow as tf

        self.seconds = self._started = 0.0
        self.callback: Any = tf.keras.callbacks.LambdaCallback(on_batch_end=self._note)

    def _note(self, batch: int, logs: object) -> None:
        if batch == 0:
            self._started = time.perf_counter()
        self.seconds = time.perf_counter() - self._started


def step_gflop(config: TrainConfig) -> float:
    """Arithmetic of a step's convolutions in GFLOP: 2 x multiply-adds, forward and twice as much backward."""
    import tensorflow as tf

    from train.model.network import build_unet

    shape = (config.batch_size, config.tile_size, config.tile_size, 1)
    traced = tf.function(build_unet(config.base_filters)).get_concrete_function(tf.TensorSpec(shape, tf.float32))
    convolutions = [one for one in traced.graph.get_operations() if one.type == "Conv2D"]
    pixels = [one.outputs[0].shape[:3].num_elements() for one in convolutions]
    multiplied = sum(int(n * one.inputs[1].shape.num_elements()) for n, one in zip(pixels, convolutions))
    return 3 * 2 * multiplied / 1e9


def matrix_product(number_format: str, count: int) -> Callable[[], float]:
    """Runs that many of TensorFlow's products of two large matrices; GFLOP a second."""
    import tensorflow as tf

    matrix = tf.cast(tf.random.uniform((_MATRIX_SIDE, _MATRIX_SIDE)), number_format)
    product = tf.function(lambda: tf.reduce_sum(tf.matmul(matrix, matrix)))
    product().numpy()

    def run() -> float:
        started = time.perf_counter()
        for _ in range(count):
            product().numpy()
        return 2 * _MATRIX_SIDE**3 * count / (time.perf_counter() - started) / 1e9

    return run


def windows_cost(config: TrainConfig, slices: Sequence[Slice], count: int) -> Callable[[], float]:
    """Cuts that many training windows on one thread; seconds a window."""
    from train.input.dataset import windows_of

    windows = windows_of(config, slices)

    def run() -> float:
        started = time.perf_counter()
        for number in range(count):
            windows.window(number)
        return (time.perf_counter() - started) / count

    return run


def throughput(config: TrainConfig, ranks: int, steps: int) -> Callable[[], float]:
    """Runs the trainer's benchmark on so many ranks, in processes of their own; images per second."""
    from train.run.log import read_log

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            run_dir, file = Path(folder) / "run", Path(folder) / "settings.json"
            settings = dataclasses.replace(
                config, exec_mode="train", benchmark=True, warmup_steps=3, max_steps=steps + 3, model_dir=str(run_dir)
            )
            write_json(file, {"settings": dataclasses.asdict(settings)})
            line = [str(Path(sys.executable).with_name("horovodrun")), "-np", str(ranks), "--gloo"] if ranks > 1 else []
            line += [sys.executable, str(MAIN), "--config", str(file)]
            log = Path(folder) / "said.txt"
            with child(line, log=log) as trainer:
                trainer.wait()
            if trainer.returncode != 0:
                raise TrainError(f"{ranks} ranks could not be measured: {log.read_text(encoding='utf-8')[-500:]}")
            (figures,) = (data for _, data in read_log(run_dir) if "training_img_per_s" in data)
            return float(figures["training_img_per_s"])

    return run


def compare(config: TrainConfig, rounds: int, steps: int) -> list[Ratio]:
    """All ratios for one configuration."""
    from train.input.split import load_data

    slices = load_data(config).training
    # Emulated, bfloat16 would say nothing and take minutes.
    formats = ["float32", "bfloat16"] if cpu_amp_dtype() == "bfloat16" else ["float32"]
    subjects: dict[str, Callable[[], float]] = {}
    for name in formats:
        one = dataclasses.replace(config, use_amp=name == "bfloat16", amp_dtype="bfloat16")
        subjects[f"ours {name}"] = our_steps(one, slices, steps)
        subjects[f"Keras {name}"] = keras_steps(one, slices, steps)
        subjects[f"product {name}"] = matrix_product(name, steps)
    for augment in (True, False):
        subjects[f"window {augment}"] = windows_cost(dataclasses.replace(config, augment=augment), slices, 20)
    found = interleave(subjects, rounds)
    shared = dataclasses.replace(config, global_batch_size=2, use_amp=True)
    found |= interleave({f"{ranks} ranks": throughput(shared, ranks, steps) for ranks in (2, 1)}, rounds)
    return ratios_of(found, formats, step_gflop(config))


def ratios_of(found: Mapping[str, Sequence[float]], formats: Sequence[str], gflop: float) -> list[Ratio]:
    """The ratios of what was measured.

    Args:
        found: seconds, GFLOP a second and images a second by subject, one value for each round.
        formats: number formats that were measured.
        gflop: arithmetic of a step.
    """
    ms = {name: [1e3 * value for value in values] for name, values in found.items()}
    rows = []
    for name in formats:
        ours = ms[f"ours {name}"]
        rows.append(Ratio(f"our step / Keras fit, {name}", "ms", ours, ms[f"Keras {name}"]))
        reached = [gflop / (step / 1e3) for step in ours]
        rows.append(Ratio(f"our step / matrix product, {name}", "GFLOP/s", reached, found[f"product {name}"]))
    if "bfloat16" in formats:
        rows.append(Ratio("bfloat16 step / float32 step", "ms", ms["ours bfloat16"], ms["ours float32"]))
    rows.append(Ratio("augmented window / plain window, one thread", "ms", ms["window True"], ms["window False"]))
    title = f"2 ranks / 1 process, batch 2 in all, {formats[-1]}"
    return [*rows, Ratio(title, "img/s", found["2 ranks"], found["1 ranks"])]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, and write everything as JSON."""
    parser = argparse.ArgumentParser(
        prog="train/compare_speed.py",
        description="Ratios of training speed. All other flags are those of train/main.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=5, help="each subject is measured so many times, in turn")
    parser.add_argument("--steps", type=int, default=10, help="steps in each measurement")
    parser.add_argument("--out", type=Path, default=Path("train_speed.json"), help="file for all figures")
    chosen, flags = parser.parse_known_args(argv)
    config = parse_config(["--augment", *flags])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    found = compare(config, chosen.rounds, chosen.steps)
    write_json(
        chosen.out,
        {
            "settings": dataclasses.asdict(config),
            "ratios": [{**dataclasses.asdict(ratio), "median": ratio.median} for ratio in found],
        },
    )
    say(f"{config.base_filters} filters, windows of {config.tile_size}, batch {config.batch_size}, {machine()}")
    say(markdown(["ratio", "medians", "median ratio", "over the rounds"], [ratio.cells() for ratio in found], "llrl"))
    say(f"all figures: {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
