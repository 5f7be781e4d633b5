from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.measure.common import MeasureError
from serve.measure.sizing.shards import shard_cost
from serve.measure.sizing.simulation import ServiceTimes, latency_of, servers_needed, simulate, volume_hours
from serve.scaling import main
from serve.server.process import TritonServer


def constant(seconds: float, batch_sizes: tuple[int, ...] = (1,)) -> ServiceTimes:
    """Each image of a batch takes the same time."""
    return ServiceTimes(batch_sizes, tuple((seconds * size,) * 6 for size in batch_sizes))


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
    times = ServiceTimes((1, 8), ((0.1,) * 6, (0.1,) * 6))
    together = simulate(times, 50, 1, 5000, np.random.default_rng(0))
    alone = simulate(constant(0.1), 50, 1, 5000, np.random.default_rng(0))
    assert together.max() < 0.4
    assert alone.max() > 10


def test_times_are_between_those_measured() -> None:
    rows = [
        {"batch_size": 1, "p50_ms": 10.0, "p95_ms": 20.0, "p99_ms": 40.0, "max_ms": 80.0},
        {"batch_size": 3, "p50_ms": 30.0, "p95_ms": 60.0, "p99_ms": 120.0, "max_ms": 240.0},
    ]
    table = ServiceTimes.from_rows(rows).table()
    assert table.shape == (3, 1001)
    assert table[:, 200] == pytest.approx([0.010, 0.020, 0.030])
    assert table[0, [500, 950, 1000]] == pytest.approx([0.010, 0.020, 0.080])


def test_what_was_not_measured_often_enough_is_taken_between_the_median_and_the_slowest() -> None:
    few = {"batch_size": 1, "p50_ms": 10.0, "p90_ms": None, "p95_ms": None, "p99_ms": None, "max_ms": 60.0}
    assert ServiceTimes.from_rows([few]).table()[0, [0, 500, 750, 1000]] == pytest.approx([0.01, 0.01, 0.035, 0.06])
    # An older benchmark knew no slowest one.
    old = {"batch_size": 1, "p50_ms": 10.0, "p95_ms": 20.0, "p99_ms": 40.0}
    assert ServiceTimes.from_rows([old]).table()[0, [500, 990, 1000]] == pytest.approx([0.01, 0.04, 0.04])


def test_the_capacity_is_that_of_the_best_batch() -> None:
    assert constant(0.1).capacity == pytest.approx(10)
    # A batch of 8 takes twice as long as one image.
    assert ServiceTimes((1, 8), ((0.1,) * 6, (0.2,) * 6)).capacity == pytest.approx(40)


def test_fewest_servers() -> None:
    times = constant(0.1)
    need = servers_needed(times, 45, 0.3, requests=5000)
    assert need.servers > 4.5
    assert need.p99_worst_ms <= 300
    assert latency_of(times, 45, need.servers - 1, requests=5000).p99_worst_ms > 300
    with pytest.raises(MeasureError, match="takes that long"):
        servers_needed(times, 1, 0.05, requests=100, most=8)


def test_no_server_is_busier_than_nine_tenths() -> None:
    """At 99 % of the capacity the queue never settles: a longer look at the same load sees longer waits."""
    times = constant(0.1)
    # Ten servers bear 100 arrivals a second on paper; the budget alone would be content with them.
    need = servers_needed(times, 99, 60.0, requests=2000)
    assert need.servers == 12
    assert need.busy == pytest.approx(99 / 120)
    looks = [latency_of(times, 9.9, 1, requests=count, seeds=1).p99_ms for count in (500, 8000)]
    assert looks[1] > 2 * looks[0]


def test_the_idle_start_is_not_counted() -> None:
    """From the moment at which nobody waits, the first requests are answered sooner than the later ones."""
    times, servers = constant(0.1), 1
    whole = simulate(times, 9.5, servers, 600, np.random.default_rng(0))
    warm = latency_of(times, 9.5, servers, requests=500, seeds=1)
    assert warm.p50_ms == pytest.approx(np.percentile(whole[100:], 50) * 1e3)
    assert warm.p50_ms > np.percentile(whole[:100], 50) * 1e3


def test_a_terabyte_by_hand() -> None:
    # 388 x 388 pixels come out of a tile of 572.
    assert volume_hours(10.0, 572, 388 * 388 * 36_000) == pytest.approx(1.0)


def test_shards_by_hand() -> None:
    cost = shard_cost(388 * 388 * 36_000, 388 * 388 * 36 / 1e6, 10.0, 572, 388 * 388 * 36_000 / 1e6 / 7200)
    assert cost.shards == 1000
    assert cost.server_hours == pytest.approx(1.0)
    assert cost.client_hours == pytest.approx(2.0)
    assert cost.lost_s == pytest.approx(1.8)
    assert str(cost).startswith("1,000 shards, 1 server hours, 2 CPU hours of the tasks")


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
    assert "|         50 |       3 |" in done.stdout
    assert "By shards of 64 million pixels: 15,625 shards" in done.stdout
    needs = json.loads((tmp_path / "scaling.json").read_text())["needs"]
    assert needs[0]["servers"] == 1
    assert needs[1]["servers"] >= 3
    assert all(need["busy"] < 0.9 for need in needs)


def test_one_server_is_measured_beside_the_simulation(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"level": "gRPC", "concurrency": 1, "tile_size": 204, "batch_size": 1, "refused": ""}
    row |= {"img_per_s": 200.0, "p50_ms": 5.0, "max_ms": 9.0}
    (tmp_path / "benchmark.json").write_text(json.dumps({"rows": [row]}))
    line = ["--benchmark", tmp_path / "benchmark.json", "--out", tmp_path / "scaling.json", "--rates", 5]
    line += ["--url", triton_server.settings.grpc_url, "--shares", 0.5, "--requests", 100, "--no_perf_analyzer"]
    assert main([str(word) for word in line]) == 0
    (found,) = json.loads((tmp_path / "scaling.json").read_text())["one_server"]
    assert len(found["measured"]["latencies_s"]) == 100
    assert found["simulated"]["p99_ms"] > 5
    assert "measured beside the simulation" in capsys.readouterr().out


def test_the_simulation_is_kept_where_the_server_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"level": "gRPC", "concurrency": 1, "tile_size": 204, "batch_size": 1, "refused": ""}
    row |= {"img_per_s": 200.0, "p50_ms": 5.0, "max_ms": 9.0}
    (tmp_path / "benchmark.json").write_text(json.dumps({"rows": [row]}))
    line = ["--benchmark", tmp_path / "benchmark.json", "--out", tmp_path / "scaling.json", "--rates", 5]
    assert main([str(word) for word in [*line, "--url", "localhost:1", "--no_perf_analyzer", "--requests", 3]]) == 2
    assert len(json.loads((tmp_path / "scaling.json").read_text())["needs"]) == 1
    assert "localhost:1" in capsys.readouterr().err
