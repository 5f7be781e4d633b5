"""Images per second of training and of inference, as the reference defines it: warm-up steps, then measured ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from train.errors import TrainError
from train.input.dataset import windows_of
from train.trainer import Trainer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from train.config import TrainConfig
    from train.input.store import Slice
    from train.run.cluster import Cluster


@dataclass(frozen=True)
class Throughput:
    """What the measured steps came to: images of all ranks over the slowest one's time, latencies of whole steps."""

    images: int
    wall_s: float
    img_per_s: float
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    input_share: float

    def __str__(self) -> str:
        return (
            f"{self.img_per_s:.2f} img/s ({self.images} images in {self.wall_s:.1f} s), step {self.mean_ms:.0f} ms, "
            f"p50 {self.p50_ms:.0f}, p90 {self.p90_ms:.0f}, p95 {self.p95_ms:.0f}, p99 {self.p99_ms:.0f} ms, "
            f"{self.input_share:.1%} waiting for input"
        )

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def time_steps(
    take: Callable[[], Any],
    step: Callable[[int, Any], None],
    warmup_steps: int,
    steps: int,
    images_per_step: int,
    cluster: Cluster | None = None,
) -> Throughput:
    """Time steps one after another, on every rank.

    Args:
        take: gives the next step's input.
        step: runs the step of a number on an input and returns when it is done.
        warmup_steps: steps before, which are not measured.
        steps: measured steps.
        images_per_step: on all ranks.
        cluster: the ranks; by default this process alone.
    """
    for number in range(warmup_steps):
        step(number, take())
    waited_s, latencies_s = 0.0, []
    started = now = time.perf_counter()
    for number in range(warmup_steps, warmup_steps + steps):
        batch = take()
        waited_s += time.perf_counter() - now
        step(number, batch)
        done = time.perf_counter()
        latencies_s.append(done - now)
        now = done
    mine = np.array([[now - started, waited_s, *latencies_s]])
    ranks = mine if cluster is None else cluster.gather(mine, name="latencies")
    wall_s, latencies = float(ranks[:, 0].max()), ranks[:, 2:]
    p50_ms, p90_ms, p95_ms, p99_ms = (float(value) * 1e3 for value in np.percentile(latencies, (50, 90, 95, 99)))
    images = steps * images_per_step
    return Throughput(
        images=images,
        wall_s=wall_s,
        img_per_s=images / wall_s,
        mean_ms=float(latencies.mean()) * 1e3,
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p95_ms=p95_ms,
        p99_ms=p99_ms,
        input_share=float(ranks[:, 1].sum() / ranks[:, 0].sum()),
    )


def measure(config: TrainConfig, cluster: Cluster, slices: Sequence[Slice], *, training: bool) -> Throughput:
    """Measure training, or inference on the same windows, with ``max_steps`` steps of which some are warm-up.

    Raises:
        TrainError: if there are no steps after the warm-up.
    """
    steps = config.max_steps - config.warmup_steps
    if steps < 1:
        raise TrainError(
            f"--max_steps {config.max_steps} leaves nothing to measure after --warmup_steps {config.warmup_steps}: "
            "raise the one or lower the other"
        )
    trainer = Trainer(config, cluster)
    trainer.synchronise()
    windows = windows_of(config, slices)
    first = cluster.rank * config.batch_size
    batches = iter(windows.batches(first, config.batch_size, trainer.global_batch, threads=cluster.input_threads))
    forward = tf.function(lambda images: trainer.model(images, training=False))

    def run(number: int, batch: tuple[tf.Tensor, ...]) -> None:
        # Reading a value back makes the step end: a GPU would else only have been given the work.
        if training:
            # As in training, the ranks add up their losses after each step.
            cluster.sum(tf.stack([trainer.step(number, batch)]), name="step_outcome").numpy()
        else:
            forward(batch[0])[0, 0, 0, 0].numpy()

    return time_steps(lambda: next(batches), run, config.warmup_steps, steps, trainer.global_batch, cluster)
