from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from serve.benchmark import _enough, main, summarise, table
from serve.perf_analyzer import PerfAnalyzer, PerfAnalyzerError, PerfRow, read_report
from serve.triton import TritonServer


def test_throughput_is_images_over_wall_time_not_the_mean_of_rates() -> None:
    row = summarise(8, [1.0, 1.0, 6.0], 10.0, True)
    assert row.img_per_s == pytest.approx(2.4)
    assert (row.requests, row.p50_ms) == (3, 1000.0)
    assert row.p50_ms <= row.p95_ms <= row.p99_ms <= 6000.0


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_says_what_was_not_measured() -> None:
    text = table([summarise(16, [1.0], 1.0, True)], {16: "no"}, 572)
    assert "V100 columns are another machine's" in text
    assert "pixels in shared memory" in text
    expected = ["16", "1", "16.00", "1000.0", "1000.0", "1000.0", "not measured", "", "", "", "83.33", "out of memory"]
    assert cells(text.splitlines()[-1]) == expected
    other = table([summarise(3, [1.0], 1.0, False)], {3: PerfRow(3, 9.0, 1.0, 2.0, 3.0)}, 572)
    assert cells(other.splitlines()[-1])[6:] == ["9.00", "1.0", "2.0", "3.0", "not measured", "not measured"]
    assert "over the connection" in other
    # The reference measured no other size.
    assert cells(table([summarise(1, [1.0], 1.0, True)], {}, 700).splitlines()[-1])[10:] == ["not measured"] * 2


def test_the_table_is_aligned() -> None:
    rows = [summarise(size, [0.001234 * size**2], 1.0, True) for size in (1, 8, 16)]
    lines = [line for line in table(rows, {8: PerfRow(8, 1234.5, 1, 2, 3)}, 572).splitlines() if line.startswith("|")]
    assert len(lines) == 5
    assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("done", "elapsed_s", "enough"),
    [
        (50, 7.9, False),  # many quick requests, the time is not over
        (8, 8.0, True),
        (7, 8.0, False),
        (7, 32.0, True),  # a slow machine
        (2, 900.0, False),  # so slow that three must do
        (3, 900.0, True),
    ],
)
def test_a_measurement_is_bounded(done: int, elapsed_s: float, enough: bool) -> None:
    assert _enough(done, 8, elapsed_s, 8.0) is enough


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
    both = [*values["rows"], *values["perf_analyzer"]]
    assert [float(row["img_per_s"]) for row in rows] == [row["img_per_s"] for row in both]
    assert [row["source"] for row in rows[:2]] == ["unet", "unet"]
    for row in values["rows"]:
        # One request after the other: throughput follows from the mean latency.
        assert row["img_per_s"] == pytest.approx(row["batch_size"] / row["mean_ms"] * 1000, rel=0.25)
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"]
        assert row["shared_memory"] is True
    for row in values["perf_analyzer"]:
        assert 0 < row["img_per_s"] < 1e6
    assert len(values["perf_analyzer"]) + len(values["not_measured"]) == 2
    assert all("saw no stable measurement" in reason for reason in values["not_measured"].values())
    assert (out / "benchmark.md").read_text(encoding="utf-8").strip() in said


def test_a_batch_that_the_model_does_not_take(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--url", triton_server.settings.grpc_url, "--tile_size", "252", "--out", str(tmp_path)]
    assert main([*flags, "--batch_sizes", "9"]) == 2
    assert "batches of 1 to 8, not of 9" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_perf_analyzer_leaves_nothing(triton_server: TritonServer, tmp_path: Path, number: int) -> None:
    code = (
        "import sys, pathlib; from serve.perf_analyzer import PerfAnalyzer; from unet.errors import command\n"
        "@command\n"
        "def main(argv=None):\n"
        "    analyzer = PerfAnalyzer(pathlib.Path(sys.argv[2]))\n"
        "    analyzer.measure(sys.argv[1], 'unet', 2, 252, requests=10**6, shared_memory=True)\n"
        "sys.exit(main())\n"
    )
    line = [sys.executable, "-c", code, triton_server.settings.grpc_url, str(tmp_path)]
    with subprocess.Popen(line, stderr=subprocess.PIPE) as process:
        measuring, segments = its_perf_analyzer(process.pid)
        process.send_signal(number)
        try:
            process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert not measuring.is_running()
    assert [path for path in segments if path.exists()] == []


def its_perf_analyzer(pid: int) -> tuple[psutil.Process, list[Path]]:
    """The perf_analyzer that a process started, once it has its shared memory."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for child in psutil.Process(pid).children():
            mapped = [Path(part.path) for part in child.memory_maps() if part.path.startswith("/dev/shm/")]
            if len(mapped) == 2:
                return child, mapped
        time.sleep(0.01)
    raise AssertionError("perf_analyzer never got as far as its shared memory")


def test_perf_analyzer_that_takes_too_long_is_a_sentence(triton_server: TritonServer, tmp_path: Path) -> None:
    with pytest.raises(PerfAnalyzerError, match="took more than 1 s"):
        PerfAnalyzer(tmp_path).measure(
            triton_server.settings.grpc_url, "unet", 1, 252, requests=10**6, shared_memory=False, timeout_s=1
        )


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
