"""NVIDIA's perf_analyzer from the tritonclient wheel: a second opinion on our benchmark."""

from __future__ import annotations

import contextlib
import csv
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from serve.measure.common import MeasureError
from unet.geometry import output_size
from unet.processes import signals_held_back

# The library names that the binary asks for; nvidia-pytriton has the same libraries with a hash in their names.
_LIBRARIES = {"libb64.so.0d": "libb64-*.so*", "libcudart.so.12": "libcudart-*.so.12*"}
_UNSTABLE = 2
# Windows that agree within this are stable.
STABLE_PERCENT = 10.0
_LOOSE_PERCENT = 1000.0
_LEAST_WINDOWS = 3
_MOST_WINDOWS = 6
_LOAD = "Concurrency"
_SHARED_MEMORY = "/dev/shm/"
# Of its report, as tritonclient 2.50 brings it; with a request rate the first one is that.
COLUMNS = (
    *(_LOAD, "Inferences/Second", "Client Send", "Network+Server Send/Recv", "Server Queue"),
    *("Server Compute Input", "Server Compute Infer", "Server Compute Output", "Client Recv"),
    *("p50 latency", "p90 latency", "p95 latency", "p99 latency"),
)


@dataclass(frozen=True)
class PerfRow:
    """One row of its report.

    Attributes:
        columns: by its own names, see `COLUMNS`; latencies are of requests, in microseconds.
        requests: that it measured; 0 if its output does not tell.
        stable: whether its windows agreed within `STABLE_PERCENT`.
    """

    columns: dict[str, float]
    requests: int = 0
    stable: bool = True

    @property
    def img_per_s(self) -> float:
        """Images a second, which it calls inferences."""
        return self.columns["Inferences/Second"]

    def ms(self, name: str) -> float:
        """A column of microseconds in milliseconds."""
        return self.columns[name] / 1e3


class PerfAnalyzer:
    """The program, made to start on this machine.

    With shared memory it first tells the server to forget the regions of all clients, so another client of the same
    server fails. It names its own regions after the model's inputs: run only one at a time.

    Args:
        reports: folder for its reports.

    Raises:
        MeasureError: if the program or one of its libraries is not installed.
    """

    def __init__(self, reports: Path) -> None:
        self._program = Path(sys.executable).parent / "perf_analyzer"
        spec = find_spec("pytriton")
        if not self._program.exists() or spec is None or spec.origin is None:
            raise MeasureError("perf_analyzer is not installed: pip install 'unet-medical-triton[serve]'")
        self._reports = reports
        carried = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
        self._libraries: dict[str, Path] = {}
        for name, pattern in _LIBRARIES.items():
            found = sorted(carried.glob(pattern))
            if not found:
                raise MeasureError(f"{carried} has no {pattern}, which perf_analyzer needs: install it again")
            self._libraries[name] = found[0]

    def measure(
        self,
        url: str,
        model_name: str,
        batch_size: int,
        tile_size: int,
        *,
        requests: int,
        memory: str,
        concurrency: int = 1,
        rate: float | None = None,
        timeout_s: float = 600.0,
    ) -> PerfRow:
        """Measure one batch size.

        Its windows last whole half seconds, so its rate of slow requests is a quarter off; here the rate is that of its
        exact latencies (Little's law), in which three windows must agree. At random arrivals its own judgement counts.

        Args:
            url: host and port of the server's gRPC.
            model_name: the served model.
            batch_size: images in a request.
            tile_size: rows and columns of an image.
            requests: in each of its measurement windows.
            memory: that images travel in: "none", "system" or "cuda".
            concurrency: requests at a time.
            rate: arrivals a second at random (a Poisson process) instead; None sends the next request after an answer.
            timeout_s: longest run.

        Raises:
            MeasureError: if it fails or takes too long; the end of its output is in the message.
        """
        report = self._reports / f"perf_analyzer-batch{batch_size}.csv"
        words = [str(self._program), "-m", model_name, "-u", url, "-i", "grpc", "-b", str(batch_size), "-v"]
        words += ["--shape", f"image:1,{tile_size},{tile_size}", "--input-data", "random", "-f", str(report)]
        words += ["--max-trials", str(_LEAST_WINDOWS if rate is None else _MOST_WINDOWS)]
        words += ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
        words += _load_words(concurrency, rate) + _memory_words(memory, batch_size, tile_size)
        self._reports.mkdir(parents=True, exist_ok=True)
        for percent in (STABLE_PERCENT, _LOOSE_PERCENT) if rate is not None else (_LOOSE_PERCENT,):
            report.unlink(missing_ok=True)
            code, said = self._run([*words, "-s", f"{percent:g}"], timeout_s)
            if code != _UNSTABLE:
                break
        if code or not report.exists():
            end = "\n".join(said.strip().splitlines()[-8:])
            raise MeasureError(f"perf_analyzer {_ending(code)} at batch {batch_size}; the end of its output is:\n{end}")
        counted = re.search(r"Request count: (\d+)", said)
        row = replace(read_report(report), requests=int(counted[1]) if counted else 0, stable=percent == STABLE_PERCENT)
        return row if rate is not None else _closed_loop(row, said, concurrency * batch_size)

    def _run(self, words: list[str], timeout_s: float) -> tuple[int, str]:
        """Its exit code and what it said."""
        with tempfile.TemporaryDirectory(prefix="perf_analyzer-") as folder:
            for name, library in self._libraries.items():
                (Path(folder) / name).symlink_to(library)
            environment = {**os.environ, "LD_LIBRARY_PATH": folder}
            with _ended_at_last(words, environment) as process:
                try:
                    said = process.communicate(timeout=timeout_s)[0]
                except subprocess.TimeoutExpired:
                    raise MeasureError(f"{self._program} took more than {timeout_s:g} s for one batch size") from None
        return process.returncode, said


def _closed_loop(row: PerfRow, said: str, images: int) -> PerfRow:
    """The row with the rate of its latencies; ``images`` are under way at any time."""
    latencies_us = [float(found) for found in re.findall(r"Pass \[\d+\].*Avg latency: (\d+) usec", said)]
    if not latencies_us:
        raise MeasureError("perf_analyzer does not tell the latencies of its windows as that of tritonclient 2.50 does")
    mean = sum(latencies_us) / len(latencies_us)
    stable = all(abs(one - mean) <= mean * STABLE_PERCENT / 100 for one in latencies_us)
    return replace(row, columns={**row.columns, "Inferences/Second": images * 1e6 / mean}, stable=stable)


def _load_words(concurrency: int, rate: float | None) -> list[str]:
    if rate is None:
        return ["--concurrency-range", str(concurrency)]
    return ["--request-rate-range", f"{rate:g}", "--request-distribution", "poisson"]


def _memory_words(memory: str, batch_size: int, tile_size: int) -> list[str]:
    if memory == "none":
        return []
    answer_bytes = batch_size * output_size(tile_size) ** 2 * 2
    return ["--shared-memory", memory, "--output-shared-memory-size", str(answer_bytes)]


def _ending(code: int) -> str:
    """How it ended, in words."""
    if code < 0:
        return f"was killed by signal {-code}"
    return "saw no stable measurement" if code == _UNSTABLE else f"failed with exit code {code}"


@contextlib.contextmanager
def _ended_at_last(words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run perf_analyzer; if it still runs at the end of the block, it is killed and its shared memory is removed.

    After SIGINT it can wait for ever, and after SIGTERM it leaves its shared memory. So it does not get a terminal's
    Ctrl-C.
    """
    with contextlib.ExitStack() as stack:
        with signals_held_back():
            process = subprocess.Popen(
                words,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            stack.callback(_end, process)
        yield process


def _end(process: subprocess.Popen[str]) -> None:
    with signals_held_back():
        if process.poll() is None:
            process.send_signal(signal.SIGSTOP)
            segments = _segments_of(process.pid)
            process.kill()
            for segment in segments:
                segment.unlink(missing_ok=True)
        process.communicate()


def _segments_of(pid: int) -> list[Path]:
    """The shared memory that a process has mapped."""
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    # Six columns; the last is the path.
    paths = {line.split(maxsplit=5)[-1] for line in maps if _SHARED_MEMORY in line}
    return [Path(path) for path in paths if not path.endswith("(deleted)")]


def read_report(path: Path) -> PerfRow:
    """The one row of a report with one concurrency.

    Raises:
        MeasureError: it has other columns.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream), {})
    row.setdefault(_LOAD, row.get("Request Rate", ""))
    try:
        return PerfRow({name: float(row[name]) for name in COLUMNS})
    except (KeyError, ValueError) as error:
        raise MeasureError(f"{path} is not what perf_analyzer of tritonclient 2.50 writes: {error!r}") from error
