"""A wall clock that jumps: ``python -m tests.torture.clock --jumps 50 --out torture.md``.

While a client segments a stack, or a small network trains for a time, the wall clock of client and server, or of the
trainer, jumps by hours, days or years, as after a set clock, a restored virtual machine or a wrong time server. The
bytes, or the weights, must be those of a run that nothing happened to, and nothing may take longer.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import tifffile

from tests.serve.volume.shards.harness import served
from tests.torture.kills import ROOT, contents, until, weights
from tests.torture.report import report
from unet.errors import say
from unet.phantom import synthetic_stack

HOUR_S, DAY_S = 3600, 86400
JUMPS_S = {
    "an hour on": HOUR_S,
    "an hour back": -HOUR_S,
    "a day on": DAY_S,
    "400 days back": -400 * DAY_S,
    "20 years on": 20 * 365 * DAY_S,
}
# What a run with a jump may take: so many times the undisturbed one and some seconds, as the machine does other work.
LONGEST, LONGEST_S = 3.0, 30.0


@dataclass
class Tally:
    """What came of it: the jumps of each kind under each command, and what was wrong."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def table(self) -> str:
        """As Markdown."""
        lines = ["| wall clock | while a client segments | while a network trains |", "|---|---:|---:|"]
        for jump in JUMPS_S:
            lines.append(f"| {jump} | {self.counts['client', jump]} | {self.counts['trainer', jump]} |")
        return "\n".join(lines)


class Clock:
    """The wall clock of all processes that are started in its `environment`."""

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clock.so", folder / "offset"
        source = Path(__file__).with_suffix(".c")
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source), "-ldl"], check=True)
        self._file.write_bytes(struct.pack("l", 0))
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._file)}

    def set(self, offset_s: int) -> None:
        """Have it show so many seconds more than the true time."""
        with self._file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as shared:
            shared[:] = struct.pack("l", offset_s)

    @contextlib.contextmanager
    def inherited(self) -> Iterator[None]:
        """Processes that this one starts within the block have it."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


@dataclass
class Command:
    """A command whose result is known.

    Attributes:
        line: the command; the folder for its results follows.
        folder: where those folders are.
        result: what is compared.
        begun: whether what is in a folder of results says that the work has begun.
        usual_s: seconds that it takes undisturbed, once that was seen.
    """

    line: Sequence[str]
    folder: Path
    result: Callable[[Path], object]
    begun: Callable[[Path], bool]
    usual_s: float = math.inf

    def run(self, clock: Clock, jump: Callable[[], None] | None = None, after_s: float = 0.0) -> tuple[object, str]:
        """Its result, and what was wrong: with a jump of the clock a while after the work has begun."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        clock.set(0)
        environment = {**os.environ, **clock.environment}
        started = time.monotonic()
        line = [*self.line, str(out)]
        with subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
            until(lambda: self.begun(out) or run.poll() is not None, "the work begins")
            if jump is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(after_s)
                jump()
            said = run.communicate()[0].decode(errors="replace")
        took = time.monotonic() - started
        if run.returncode:
            return None, f"exit code {run.returncode}: {said.strip()[-300:]}"
        late = took > LONGEST * self.usual_s + LONGEST_S
        self.usual_s = min(self.usual_s, took)
        return self.result(out), f"it took {took:.0f} s instead of {self.usual_s:.0f}" if late else ""


def client(folder: Path, url: str) -> Command:
    """Segments a stack for about a second."""
    pixels = np.random.default_rng(4).integers(0, 256, (200, 120, 130), np.uint8)
    tifffile.imwrite(folder / "v.tif", pixels, photometric="minisblack")
    line = [sys.executable, "serve/client.py", str(folder / "v.tif"), "--url", url, "--quiet"]
    line += ["--timeout_s", "10", "--patience_s", "10", "--output", "probability", "--output", "labels", "--output_dir"]
    return Command(line, folder, contents, lambda out: any(out.glob("*.partial/journal*")))


def trainer(folder: Path) -> Command:
    """Trains a small network: 16 steps."""
    images, labels = synthetic_stack(slices=5, size=96, seed=1)
    tifffile.imwrite(folder / "train-volume.tif", images)
    tifffile.imwrite(folder / "train-labels.tif", labels * np.uint8(255))
    line = [sys.executable, "train/main.py", "--exec_mode", "train", "--data_dir", str(folder), "--base_filters", "2"]
    line += ["--tile_size", "188", "--max_steps", "16", "--checkpoint_every", "2", "--log_every", "1"]
    line += ["--validation_share", "0.2", "--max_minutes", "5", "--model_dir"]

    def arrays(out: Path) -> list[bytes]:
        return [array.tobytes() for array in weights(out)]

    return Command(line, folder, arrays, lambda out: (out / "log.json").exists())


def attack(jumps: int, trainings: int, seed: int = 0, *, note: Callable[[str], None] = lambda text: None) -> Tally:
    """Let the clock jump so many times under a client and its server, and under a training run.

    Args:
        jumps: under the client.
        trainings: jumps under the trainer.
        seed: of the moments.
        note: takes a line now and then.
    """
    found, rng = Tally(), random.Random(seed)
    with contextlib.ExitStack() as stack:
        folders = [Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unet-clock-"))) for _ in range(3)]
        clock = Clock(folders[0])
        with clock.inherited():
            url = stack.enter_context(served((204,)))
        for name, count, command in (
            ("client", jumps, client(folders[1], url)),
            ("trainer", trainings, trainer(folders[2])),
        ):
            whole, problem = command.run(clock)
            assert not problem, problem
            for number in range(count):
                jump, offset_s = list(JUMPS_S.items())[number % len(JUMPS_S)]
                result, problem = command.run(clock, partial(clock.set, offset_s), rng.uniform(0, 2))
                found.counts[name, jump] += 1
                if problem or result != whole:
                    found.faults.append(f"{name}, {jump}: {problem or 'another result'}")
                note(f"{number + 1} of {count} jumps under the {name}, {len(found.faults)} faults")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.clock", description="A wall clock that jumps.")
    parser.add_argument("--jumps", type=int, default=50, help="under a client (default: 50)")
    parser.add_argument("--trainings", type=int, default=10, help="jumps under a training run (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the counts are added to this file")
    chosen = parser.parse_args(argv)
    found = attack(chosen.jumps, chosen.trainings, chosen.seed, note=say)
    lines = ["", "# A wall clock that jumps", "", found.table(), "", *(f"- {fault}" for fault in found.faults)]
    return report(lines, chosen.out, found.faults)


if __name__ == "__main__":
    sys.exit(main())
