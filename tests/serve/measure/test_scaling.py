from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.measure.scaling import ScalingError, ServiceTimes, servers_needed, simulate, volume_hours


def constant(seconds: float, batch_sizes: tuple[int, ...] = (1,)) -> ServiceTimes:
    """Each image of a batch takes the same time."""
    return ServiceTimes(batch_sizes, tuple((seconds * size,) * 5 for size in batch_sizes))


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_waits_as_queueing_theory_says(load: float) -> None:
    """Pollaczek and Khinchine, constant service times: the mean wait is load / (2 (1 - load)) services."""
    latencies = simulate(constant(0.5), load / 0.5, 1, 200_000, np.random.default_rng(0))
    assert (latencies.mean() - 0.5) / 0.5 == pytest.approx(load / (2 * (1 - load)), rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.floats(0.5, 40), st.integers(1, 8), st.integers(0, 100))
def test_no_answer_before_its_service_and_more_servers_never_hurt(rate: float, servers: int, seed: int) -> None:
    times = constant(0.1)
    few, more = (simulate(times, rate, count, 500, np.random.default_rng(seed)) for count in (servers, servers + 1))
    assert few.min() >= 0.1 - 1e-9
    assert np.all(more <= few + 1e-9)


def test_batches_let_a_server_bear_what_single_images_would_not() -> None:
    # A batch of 8 takes as long as one image does.
    times = ServiceTimes((1, 8), ((0.1,) * 5, (0.1,) * 5))
    together = simulate(times, 50, 1, 5000, np.random.default_rng(0))
    alone = simulate(constant(0.1), 50, 1, 5000, np.random.default_rng(0))
    assert together.max() < 0.4
    assert alone.max() > 10


def test_times_are_between_those_measured() -> None:
    rows = [
        {"batch_size": 1, "p50_ms": 10.0, "p95_ms": 20.0, "p99_ms": 40.0},
        {"batch_size": 3, "p50_ms": 30.0, "p95_ms": 60.0, "p99_ms": 120.0},
    ]
    times = ServiceTimes.from_rows(rows)
    assert [times.draw(size, 0.2) for size in (1, 2, 3)] == pytest.approx([0.010, 0.020, 0.030])
    assert [times.draw(1, share) for share in (0.5, 0.95, 1.0)] == pytest.approx([0.010, 0.020, 0.040])


def test_fewest_servers() -> None:
    times = constant(0.1)
    need = servers_needed(times, 45, 0.3, requests=5000)
    assert need.servers > 4.5
    assert need.p99_ms <= 300
    fewer = simulate(times, 45, need.servers - 1, 5000, np.random.default_rng(0))
    assert np.percentile(fewer, 99) > 0.3
    with pytest.raises(ScalingError, match="takes that long"):
        servers_needed(times, 1, 0.05, requests=100, most=8)


def test_a_terabyte_by_hand() -> None:
    # 388 x 388 pixels come out of a tile of 572.
    assert volume_hours(10.0, 572, 388 * 388 * 36_000) == pytest.approx(1.0)


def test_the_command(project_root: Path, tmp_path: Path) -> None:
    line = [sys.executable, "serve/scaling.py", "--out", str(tmp_path / "scaling.json"), "--rates", "5", "50"]
    row = {"level": "gRPC", "concurrency": 1, "tile_size": 572, "batch_size": 1}
    row |= {"img_per_s": 20.0, "p50_ms": 50.0, "p95_ms": 60.0, "p99_ms": 80.0}
    records = [{}, {"rows": [{**row, "refused": "noise"}]}, {"rows": [{**row, "refused": ""}]}]
    record = tmp_path / "benchmark.json"
    for text, code in zip(map(json.dumps, records), (2, 2, 0)):
        record.write_text(text)
        done = subprocess.run(
            [*line, "--benchmark", str(record)], cwd=project_root, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
    assert "| 50 |" in done.stdout
    needs = json.loads((tmp_path / "scaling.json").read_text())["needs"]
    assert needs[0]["servers"] == 1
    assert needs[1]["servers"] >= 3
