"""Publishes and rolls back under a client: ``python -m tests.torture.publishing --changes 100 --out torture.md``.

Two networks take turns on a running server, by the publisher's own command. A client segments a white stack, one run
after the other: no run may fail, and the slices of a stack are of one network, which all of its pixels show. The server
keeps the version before the newest; of two changes within one stack the first one's client ends in a sentence. So each
change falls into another stack.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.repository import main as repository
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.serve.conftest import artefacts_dividing_by
from tests.torture.report import report
from unet.errors import say
from unet.processes import free_ports

CLIENT = Path(__file__).resolve().parents[2] / "serve" / "client.py"
SLICES = 400
# What the two networks make of white, exactly.
WHITE = {255: 1.0, 510: 0.5}
_LIMIT_S = 60.0


@dataclass
class Loaded:
    """What came of it.

    Attributes:
        changes: of the served version.
        within: of these, made and loaded while one stack was under way.
        runs: of the client.
        answers: of each value that a whole stack had, how many had it.
        faults: what went wrong.
    """

    changes: int = 0
    within: int = 0
    runs: int = 0
    answers: Counter[float] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        """In words."""
        values = ", ".join(f"{count} stacks of {value:g}" for value, count in sorted(self.answers.items()))
        return (
            f"{self.changes} publishes and rollbacks, {self.within} of them within one stack; {self.runs} runs of the "
            f"client: {values}; {len(self.faults)} faults."
        )


class _Client:
    """Segments a stack again and again until it is told to stop."""

    def __init__(self, folder: Path, url: str, found: Loaded) -> None:
        self._source, self._out, self._found = folder / "white.tif", folder / "out", found
        tifffile.imwrite(self._source, np.full((SLICES, 40, 30), 255, np.uint8), photometric="minisblack")
        self._line = [sys.executable, str(CLIENT), str(self._source), "--url", url, "--quiet", "--overwrite"]
        self._line += ["--in_flight", "1", "--batch_size", "1", "--output_dir", str(self._out)]
        self._journal = self._out / "white.partial" / "journal.jsonl"
        self.enough, self.ran = threading.Event(), threading.Condition()

    def slices_done(self) -> int:
        """Of the stack under way."""
        with contextlib.suppress(OSError):
            return self._journal.read_bytes().count(b'"crc"')
        return 0

    def run(self) -> None:
        """Until `enough` is set."""
        while not self.enough.is_set():
            done = subprocess.run(self._line, capture_output=True, text=True, check=False)
            with self.ran:
                self._found.runs += 1
                self._look(done)
                self.ran.notify_all()

    def _look(self, done: subprocess.CompletedProcess[str]) -> None:
        if done.returncode != 0:
            self._found.faults.append(f"run {self._found.runs} failed: {done.stderr.strip()[-300:]}")
            return
        values = sorted(
            {round(float(one), 3) for one in np.unique(tifffile.imread(self._out / "white-probability.tif"))}
        )
        if len(values) != 1 or values[0] not in WHITE.values():
            self._found.faults.append(f"run {self._found.runs}: a stack of {values}")
            return
        self._found.answers[values[0]] += 1


def attack(changes: int, *, note: Callable[[str], None] = lambda text: None) -> Loaded:
    """Publish and roll back so many times while a client segments.

    Args:
        changes: how many, two publishes and a rollback in turn.
        note: takes a line now and then.
    """
    found, rng = Loaded(), random.Random(1)
    with tempfile.TemporaryDirectory(prefix="unet-publishing-") as name:
        folder = Path(name)
        both = [artefacts_dividing_by(folder / f"by-{divisor}", divisor) for divisor in WHITE]
        publish(both[0], folder / "models", ModelSettings(max_batch_size=8))
        http, grpc, metrics = free_ports(3)
        settings = ServerSettings(
            folder / "models",
            folder / "triton.log",
            folder / "state",
            http,
            grpc,
            metrics,
            model_control="explicit",
            restarts=0,
        )
        with TritonServer(settings) as server:
            client = _Client(folder, server.settings.grpc_url, found)
            thread = threading.Thread(target=client.run)
            thread.start()
            said = time.monotonic()
            try:
                for number in range(changes):
                    _await(client, rng.randrange(1, SLICES // 2))
                    runs = found.runs
                    _change(folder, both, number, found)
                    found.within += found.runs == runs and client.slices_done() > 0
                    _await_run(client, found)
                    if time.monotonic() - said > 10:
                        said = time.monotonic()
                        note(f"{number + 1} of {changes} changes, {found.runs} runs, {len(found.faults)} faults")
                _await_run(client, found)
            finally:
                client.enough.set()
                thread.join()
    return found


def _await(client: _Client, slices: int) -> None:
    """Until so many slices of a stack are done, or of a short run all are."""
    until = time.monotonic() + _LIMIT_S
    while client.slices_done() < slices and time.monotonic() < until:
        time.sleep(0.005)


def _await_run(client: _Client, found: Loaded) -> None:
    """Until the run under way has ended."""
    until = found.runs + 1
    with client.ran:
        client.ran.wait_for(lambda: found.runs >= until, timeout=_LIMIT_S)


def _change(folder: Path, both: Sequence[Path], number: int, found: Loaded) -> None:
    """Publish the other network; every third time go back to the former one."""
    line = ["--model_repository", str(folder / "models"), "--load", "--state_dir", str(folder / "state")]
    what = ["--rollback"] if number % 3 == 2 else ["--artefacts", str(both[(number + 1) % 2]), "--max_batch_size", "8"]
    code = repository([*what, *line])
    found.changes += 1
    if code:
        found.faults.append(f"change {number + 1} ended with {code}")


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if something went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.publishing", description="Publishing under load.")
    parser.add_argument("--changes", type=int, default=100, help="publishes and rollbacks (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the counts are added to this file")
    chosen = parser.parse_args(argv)
    found = attack(chosen.changes, note=say)
    lines = ["", "# Publishing under load", "", found.line(), "", *(f"- {fault}" for fault in found.faults)]
    return report(lines, chosen.out, found.faults)


if __name__ == "__main__":
    sys.exit(main())
