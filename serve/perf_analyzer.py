"""NVIDIA's perf_analyzer, the one that the tritonclient wheel carries, as a second opinion on our benchmark."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from unet.errors import UnetError
from unet.geometry import output_size

# The names under which the binary wants the libraries that nvidia-pytriton carries with a hash in theirs.
_LIBRARIES = {"libb64.so.0d": "libb64-*.so*", "libcudart.so.12": "libcudart-*.so.12*"}
_UNSTABLE = 2
_STABILITY_PERCENT = (40, 80)


class PerfAnalyzerError(UnetError):
    """perf_analyzer is not there or did not measure."""


@dataclass(frozen=True)
class PerfRow:
    """One row of its report: what it calls inferences are images; latencies are of requests, in milliseconds."""

    batch_size: int
    img_per_s: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


class PerfAnalyzer:
    """The program, made to start on this machine.

    Args:
        work_dir: folder for links to its libraries and for its reports.

    Raises:
        PerfAnalyzerError: if the program or one of its libraries is not installed.
    """

    def __init__(self, work_dir: Path) -> None:
        self._program = Path(sys.executable).parent / "perf_analyzer"
        spec = find_spec("pytriton")
        if not self._program.exists() or spec is None or spec.origin is None:
            raise PerfAnalyzerError("perf_analyzer is not installed: pip install 'unet-medical-triton[serve]'")
        self._work_dir = work_dir
        self._links = work_dir / "perf_analyzer-libraries"
        self._links.mkdir(parents=True, exist_ok=True)
        carried = Path(spec.origin).parent.parent / "nvidia_pytriton.libs"
        for name, pattern in _LIBRARIES.items():
            found = sorted(carried.glob(pattern))
            if not found:
                raise PerfAnalyzerError(f"{carried} has no {pattern}, which perf_analyzer needs: install it again")
            link = self._links / name
            link.unlink(missing_ok=True)
            link.symlink_to(found[0])

    def measure(
        self,
        url: str,
        model_name: str,
        batch_size: int,
        tile_size: int,
        *,
        requests: int,
        shared_memory: bool,
        timeout_s: float = 600.0,
    ) -> PerfRow:
        """Measure one batch size with one request at a time.

        Three of its windows must agree within 40 %, or, on a second try, within 80 %.

        Args:
            url: host and port of the server's gRPC.
            model_name: the served model.
            batch_size: images in a request.
            tile_size: rows and columns of an image.
            requests: in each of its measurement windows.
            shared_memory: whether images travel in system shared memory.
            timeout_s: longest run.

        Raises:
            PerfAnalyzerError: if it fails, is not stable, or takes too long; the end of its output is in the message.
        """
        report = self._work_dir / f"perf_analyzer-batch{batch_size}.csv"
        words = [str(self._program), "-m", model_name, "-u", url, "-i", "grpc", "-b", str(batch_size)]
        words += ["--shape", f"image:1,{tile_size},{tile_size}", "--input-data", "random", "--concurrency-range", "1"]
        words += ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
        words += ["-f", str(report)]
        if shared_memory:
            size = batch_size * output_size(tile_size) ** 2 * 2
            words += ["--shared-memory", "system", "--output-shared-memory-size", str(size)]
        for percent in _STABILITY_PERCENT:
            report.unlink(missing_ok=True)
            done = self._run([*words, "-s", str(percent)], timeout_s)
            if done.returncode != _UNSTABLE:
                break
        if done.returncode or not report.exists():
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            reason = "saw no stable measurement" if done.returncode == _UNSTABLE else "failed"
            raise PerfAnalyzerError(f"perf_analyzer {reason} at batch {batch_size}; the end of its output is:\n{tail}")
        return read_report(report, batch_size)

    def _run(self, words: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self._links)}
        try:
            return subprocess.run(
                words, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s
            )
        except subprocess.TimeoutExpired:
            raise PerfAnalyzerError(f"{self._program} took more than {timeout_s:.0f} s for one batch size") from None


def read_report(path: Path, batch_size: int) -> PerfRow:
    """The one row of a report with one concurrency."""
    with path.open(newline="", encoding="utf-8") as stream:
        row = next(csv.DictReader(stream))
    return PerfRow(
        batch_size,
        float(row["Inferences/Second"]),
        *(float(row[f"p{percent} latency"]) / 1000 for percent in (50, 95, 99)),
    )
