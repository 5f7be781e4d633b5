from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from serve.measure import perf_analyzer
from serve.measure.common import MeasureError
from serve.measure.perf_analyzer import COLUMNS, PerfAnalyzer, read_report
from serve.server.process import TritonServer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_perf_analyzer_leaves_nothing(triton_server: TritonServer, tmp_path: Path, number: int) -> None:
    code = (
        "import sys, pathlib; from serve.measure.perf_analyzer import PerfAnalyzer; from unet.errors import command\n"
        "@command\n"
        "def main(argv=None):\n"
        "    analyzer = PerfAnalyzer(pathlib.Path(sys.argv[2]))\n"
        "    analyzer.measure(sys.argv[1], 'unet', 2, 252, requests=10**6, memory='system')\n"
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
    with pytest.raises(MeasureError, match="took more than 1 s"):
        PerfAnalyzer(tmp_path).measure(
            triton_server.settings.grpc_url, "unet", 1, 252, requests=10**6, memory="none", timeout_s=1
        )


def test_perf_analyzer_without_a_server_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MeasureError, match="perf_analyzer failed with exit code 99 at batch 1"):
        PerfAnalyzer(tmp_path).measure("localhost:1", "unet", 1, 252, requests=3, memory="none")


def test_the_report_is_read_in_milliseconds(tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    # As perf_analyzer of tritonclient 2.50 writes it.
    path.write_text(
        "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
        "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
        "1,42.5,10,20,30,40,50,60,2,23000,24000,25000,26000\n"
    )
    row = read_report(path)
    assert tuple(row.columns) == COLUMNS
    assert (row.img_per_s, row.ms("p50 latency"), row.ms("p99 latency"), row.ms("Server Queue")) == (42.5, 23, 26, 0.03)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "Concurrency,Inferences/Second\n1,many\n"])
def test_another_report_is_a_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.csv"
    path.write_text(text)
    with pytest.raises(MeasureError, match=r"report.csv is not what perf_analyzer of tritonclient 2\.50 writes"):
        read_report(path)


# As perf_analyzer of tritonclient 2.50 says it with -v: three windows of one request of 8 images, which takes 2.2 s.
WINDOWS = """
  Pass [1] throughput: 2.66595 infer/sec. Avg latency: 2164403 usec (std 18446744073709551615 usec). 
  Pass [2] throughput: 3.99801 infer/sec. Avg latency: 2156676 usec (std 18446744073709551615 usec). 
  Pass [3] throughput: 3.99357 infer/sec. Avg latency: {last} usec (std 18446744073709551615 usec). 
"""  # noqa: W291


def test_the_rate_of_slow_requests_is_that_of_their_latencies() -> None:
    row = perf_analyzer.PerfRow(dict.fromkeys(COLUMNS, 3.55))
    steady = perf_analyzer._closed_loop(row, WINDOWS.format(last=2168414), 8)
    assert steady.stable
    assert steady.img_per_s == pytest.approx(8 / 2.163164, rel=1e-6)
    assert steady.columns["p50 latency"] == 3.55
    assert not perf_analyzer._closed_loop(row, WINDOWS.format(last=2968414), 8).stable
    with pytest.raises(MeasureError, match="does not tell the latencies of its windows"):
        perf_analyzer._closed_loop(row, "", 8)


def test_requests_at_a_time_are_measured(triton_server: TritonServer, tmp_path: Path) -> None:
    row = PerfAnalyzer(tmp_path).measure(
        triton_server.settings.grpc_url, "unet", 2, 252, requests=20, memory="system", concurrency=3
    )
    assert row.columns["Concurrency"] == 3
    assert row.img_per_s > 0


def test_windows_that_do_not_agree_are_said_to_be_unstable(
    triton_server: TritonServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(perf_analyzer, "STABLE_PERCENT", 1e-4)  # windows never agree so closely
    row = PerfAnalyzer(tmp_path).measure(triton_server.settings.grpc_url, "unet", 1, 252, requests=30, memory="none")
    assert not row.stable
    assert row.img_per_s > 0
    assert row.requests >= 30


def test_requests_arrive_at_a_rate(triton_server: TritonServer, tmp_path: Path) -> None:
    url = triton_server.settings.grpc_url
    row = PerfAnalyzer(tmp_path).measure(url, "unet", 1, 204, requests=20, memory="none", rate=50.0)
    # Its first column is then the rate.
    assert row.columns["Concurrency"] == 50
    assert 10 < row.img_per_s < 90
