from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from serve.benchmark import main, summarise, table
from serve.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, PerfRow, read_report
from serve.triton import TritonServer


def test_throughput_is_images_over_wall_time_not_the_mean_of_rates() -> None:
    row = summarise(8, [1.0, 1.0, 6.0], 10.0)
    assert row.img_per_s == pytest.approx(2.4)
    assert (row.requests, row.p50_ms) == (3, 1000.0)
    assert row.p50_ms <= row.p95_ms <= row.p99_ms <= 6000.0


def test_the_table_says_what_was_not_measured() -> None:
    row = summarise(16, [1.0], 1.0)
    text = table([row], {16: "no"}, 572, "pixels in shared memory")
    assert "another machine, a V100" in text
    assert text.splitlines()[-1] == (
        "| 16 | 1 | 16.00 | 1000 | 1000 | 1000 | not measured | | |  | 83.33 | out of memory |"
    )
    other = table([summarise(3, [1.0], 1.0)], {3: PerfRow(3, 9.0, 1.0, 2.0, 3.0)}, 572, "x")
    assert other.splitlines()[-1].endswith("| 9.00 | 1 | 2 | 3 | not measured | not measured |")


@pytest.fixture
def report(triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    flags = ["--url", triton_server.settings.grpc_url, "--tile_size", "252", "--batch_sizes", "1", "4"]
    assert main([*flags, "--seconds", "0.5", "--requests", "5", "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out", capsys.readouterr().out


def test_both_measure_the_real_server(report: tuple[Path, str]) -> None:
    out, said = report
    values = json.loads((out / "benchmark.json").read_text(encoding="utf-8"))
    assert [row["batch_size"] for row in values["rows"]] == [1, 4]
    with (out / "benchmark.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["img_per_s"]) for row in rows] == [row["img_per_s"] for row in values["rows"]]
    for row in values["rows"]:
        # One request after the other: throughput follows from the mean latency.
        assert row["img_per_s"] == pytest.approx(row["batch_size"] / row["mean_ms"] * 1000, rel=0.25)
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
    for row in values["perf_analyzer"]:
        assert 0 < row["img_per_s"] < 1e6
    assert len(values["perf_analyzer"]) + said.count("saw no stable measurement") == 2
    assert (out / "benchmark.md").read_text(encoding="utf-8").strip() in said


def test_a_batch_that_the_model_does_not_take(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--url", triton_server.settings.grpc_url, "--tile_size", "252", "--out", str(tmp_path)]
    assert main([*flags, "--batch_sizes", "9"]) == 2
    assert "batches of 8 at most, not 9" in capsys.readouterr().err


def test_perf_analyzer_without_a_server_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(PerfAnalyzerError, match="perf_analyzer failed at batch 1"):
        PerfAnalyzer(tmp_path).measure("localhost:1", "unet", 1, 252, requests=3, shared_memory=False)


def test_the_report_is_read_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    # As perf_analyzer of tritonclient 2.50 writes it.
    path.write_text(
        "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
        "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
        "1,42.5,10,20,30,40,50,60,2,23000,24000,25000,26000\n"
    )
    assert read_report(path, 8) == PerfRow(8, 42.5, 23.0, 25.0, 26.0)
