from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.config import TrainConfig
from train.errors import TrainError
from train.input.store import Slice
from train.run.cluster import Cluster
from train.throughput import measure, time_steps


def test_images_over_wall_time_without_the_warm_up() -> None:
    numbers = []

    def step(number: int, batch: float) -> None:
        numbers.append(number)
        # Five slow steps first, which must not count.
        time.sleep(0.05 if number < 5 else batch)

    figures = time_steps(lambda: 0.002, step, warmup_steps=5, steps=20, images_per_step=4)
    assert numbers == list(range(25))
    assert figures.images == 80
    assert figures.img_per_s == pytest.approx(80 / figures.wall_s)
    assert figures.mean_ms == pytest.approx(figures.wall_s / 20 * 1e3, rel=0.01)
    assert 2 <= figures.p50_ms <= figures.p90_ms <= figures.p95_ms <= figures.p99_ms < 50


class TwoRanks(Cluster):
    """This rank and one that was twice as slow in every step; what this one measured is kept."""

    def gather(self, values: np.ndarray, name: str) -> np.ndarray:  # type: ignore[type-arg]
        object.__setattr__(self, "measured", values)
        return np.concatenate([values, 2 * values])


def test_the_slowest_rank_decides() -> None:
    ranks = TwoRanks()
    figures = time_steps(lambda: 0, lambda *_: time.sleep(0.005), 0, 10, 2, ranks)
    wall_s, _, *latencies_s = ranks.measured[0]  # type: ignore[attr-defined]
    assert len(latencies_s) == 10
    assert figures.img_per_s == pytest.approx(20 / (2 * wall_s))
    both = np.concatenate([latencies_s, 2 * np.array(latencies_s)])
    assert figures.p99_ms == pytest.approx(1e3 * np.percentile(both, 99))
    assert figures.mean_ms == pytest.approx(1.5e3 * np.mean(latencies_s))


def test_the_share_of_the_input_is_what_steps_wait() -> None:
    figures = time_steps(lambda: time.sleep(0.02), lambda *_: time.sleep(0.005), 0, 5, 1)
    assert 0.6 < figures.input_share < 0.9


@pytest.mark.parametrize("training", [True, False])
def test_the_real_network_is_measured(tiny: Callable[..., TrainConfig], slices: list[Slice], training: bool) -> None:
    config = tiny(max_steps=5, warmup_steps=2, batch_size=2, augment=True)
    figures = measure(config, Cluster(), slices, training=training)
    assert figures.images == 6
    assert 0 < figures.input_share < 1
    with pytest.raises(TrainError, match="leaves nothing to measure"):
        measure(dataclasses.replace(config, warmup_steps=5), Cluster(), slices, training=training)


def test_both_are_measured_by_the_command(tiny: Callable[..., TrainConfig], project_root: Path) -> None:
    config = tiny(exec_mode="benchmark", max_steps=3, warmup_steps=1)
    flags = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items() if not isinstance(value, bool)]
    line = [sys.executable, str(project_root / "train" / "main.py"), *flags]
    said = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert [text.split(":")[0] for text in said.splitlines()] == ["training", "inference"]
    lines = (Path(config.model_dir) / "log.json").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0][5:])["data"]["training_images"] == 2
    # Nothing was trained, so nothing may look as if it had been.
    assert not (Path(config.model_dir) / "saved_model").exists()
