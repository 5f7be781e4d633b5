"""NVIDIA's perf_analyzer, the one that the tritonclient wheel carries, as a second opinion on our benchmark."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from unet.errors import UnetError
from unet.geometry import output_size
from unet.processes import signals_held_back

# The names under which the binary wants the libraries that nvidia-pytriton carries with a hash in theirs.
_LIBRARIES = {"libb64.so.0d": "libb64-*.so*", "libcudart.so.12": "libcudart-*.so.12*"}
_UNSTABLE = 2
_STABILITY_PERCENT = (40, 80)
_MOST_WINDOWS = 6
_SHARED_MEMORY = "/dev/shm/"
# Of its report, as tritonclient 2.50 brings it.
COLUMNS = (
    *("Concurrency", "Inferences/Second", "Client Send", "Network+Server Send/Recv", "Server Queue"),
    *("Server Compute Input", "Server Compute Infer", "Server Compute Output", "Client Recv"),
    *("p50 latency", "p90 latency", "p95 latency", "p99 latency"),
)


class PerfAnalyzerError(UnetError):
    """perf_analyzer is not there or did not measure."""


@dataclass(frozen=True)
class PerfRow:
    """One row of its report.

    Attributes:
        columns: by its own names, see `COLUMNS`; latencies are of requests, in microseconds.
    """

    columns: dict[str, float]

    @property
    def img_per_s(self) -> float:
        """Images a second, which it calls inferences."""
        return self.columns["Inferences/Second"]

    def ms(self, name: str) -> float:
        """A column of microseconds in milliseconds."""
        return self.columns[name] / 1e3


class PerfAnalyzer:
    """The program, made to start on this machine.

    Where it uses shared memory it first has the server forget everyone's regions, so that a client that is at work on
    the same server fails, and it names its own after the model's inputs: let one run at a time.

    Args:
        reports: folder for its reports.

    Raises:
        PerfAnalyzerError: if the program or one of its libraries is not installed.
    """

    def __init__(self, reports: Path) -> None:
        self._program = Path(sys.executable).parent / "perf_analyzer"
        spec = find_spec("pytriton")
        if not self._program.exists() or spec is None or spec.origin is None:
            raise PerfAnalyzerError("perf_analyzer is not installed: pip install 'unet-medical-triton[serve]'")
        self._reports = reports
        carried = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
        self._libraries: dict[str, Path] = {}
        for name, pattern in _LIBRARIES.items():
            found = sorted(carried.glob(pattern))
            if not found:
                raise PerfAnalyzerError(f"{carried} has no {pattern}, which perf_analyzer needs: install it again")
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
        timeout_s: float = 600.0,
    ) -> PerfRow:
        """Measure one batch size.

        Three of its windows must agree within 40 %, or, on a second try, within 80 %.

        Args:
            url: host and port of the server's gRPC.
            model_name: the served model.
            batch_size: images in a request.
            tile_size: rows and columns of an image.
            requests: in each of its measurement windows.
            memory: that images travel in: "none", "system" or "cuda".
            concurrency: requests at a time.
            timeout_s: longest run.

        Raises:
            PerfAnalyzerError: if it fails, is not stable, or takes too long; the end of its output is in the message.
        """
        report = self._reports / f"perf_analyzer-batch{batch_size}.csv"
        words = [str(self._program), "-m", model_name, "-u", url, "-i", "grpc", "-b", str(batch_size)]
        words += ["--shape", f"image:1,{tile_size},{tile_size}", "--input-data", "random"]
        words += ["--concurrency-range", str(concurrency), "--measurement-mode", "count_windows"]
        words += ["--measurement-request-count", str(requests)]
        words += ["--max-trials", str(_MOST_WINDOWS), "-f", str(report)]
        if memory != "none":
            size = batch_size * output_size(tile_size) ** 2 * 2
            words += ["--shared-memory", memory, "--output-shared-memory-size", str(size)]
        self._reports.mkdir(parents=True, exist_ok=True)
        for percent in _STABILITY_PERCENT:
            report.unlink(missing_ok=True)
            code, said = self._run([*words, "-s", str(percent)], timeout_s)
            if code != _UNSTABLE:
                break
        if code or not report.exists():
            tail = "\n".join(said.strip().splitlines()[-8:])
            reason = "saw no stable measurement" if code == _UNSTABLE else "failed"
            raise PerfAnalyzerError(f"perf_analyzer {reason} at batch {batch_size}; the end of its output is:\n{tail}")
        return read_report(report)

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
                    raise PerfAnalyzerError(
                        f"{self._program} took more than {timeout_s:g} s for one batch size"
                    ) from None
        return process.returncode, said


@contextlib.contextmanager
def _ended_at_last(words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run perf_analyzer; if it still runs at the block's end, it is killed and its shared memory is removed.

    On SIGINT it can wait for ever, on SIGTERM it leaves its shared memory: so a terminal's Ctrl-C is kept from it.
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
        PerfAnalyzerError: it has other columns.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream), {})
    try:
        return PerfRow({name: float(row[name]) for name in COLUMNS})
    except (KeyError, ValueError) as error:
        raise PerfAnalyzerError(f"{path} is not what perf_analyzer of tritonclient 2.50 writes: {error!r}") from error
