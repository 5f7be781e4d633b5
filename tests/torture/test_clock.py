"""A wall clock that jumps, each way once; fifty times under a client, and under training, by `make torture`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.torture.clock import DAY_S, JUMPS_S, Clock, attack


def test_a_clock_that_jumps_costs_no_pixel() -> None:
    found = attack(len(JUMPS_S), 0)
    assert found.faults == []
    assert found.counts.total() == len(JUMPS_S)


def test_the_clock_of_a_process_that_runs_jumps(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    code = "import sys, time\nfor _ in sys.stdin: print(time.time(), time.monotonic(), flush=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **clock.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for offset_s in (0, DAY_S, -DAY_S):
            clock.set(offset_s)
            process.stdin.write("\n")
            process.stdin.flush()
            wall, monotonic = map(float, process.stdout.readline().split())
            assert abs(wall - time.time() - offset_s) < 600
            assert abs(monotonic - time.monotonic()) < 600
        process.stdin.close()
