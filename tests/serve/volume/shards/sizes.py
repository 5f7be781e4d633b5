"""Memory and time of ``--shard`` as a function of size: ``python -m tests.serve.volume.shards.sizes``.

Sparse volumes are made by block and masked by four processes with a limit of memory each. The network gives the
middle of its tile back: what is measured is reading, sending, receiving, writing and marking, not convolutions.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.serve.volume.shards.harness import make_blocks, served
from unet.errors import command, say
from unet.measure import markdown

SIDE, DEPTH, TILE = 2048, 16, 2236


def measure(folder: Path, url: str, slices: int, processes: int, limit_bytes: int) -> tuple[float, int, float]:
    """Seconds of all processes together, the largest resident memory in bytes, and CPU seconds."""
    source = make_blocks(folder / "v.zarr", (slices, SIDE, SIDE), (DEPTH, 512, 512), every=8)
    line = [sys.executable, "serve/client.py", str(source), "--url", url, "--output", "mask", "--quiet"]
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [*line, "--shard", f"{index}/{processes}"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit_bytes, limit_bytes)),
        )
        for index in range(processes)
    ]
    peak, cpu_s = 0, 0.0
    for process in running:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"a share ended with {process.returncode}")
        peak, cpu_s = max(peak, usage.ru_maxrss * 1024), cpu_s + usage.ru_utime + usage.ru_stime
    seconds = time.monotonic() - started
    assert (folder / "v-mask.zarr").exists()
    for path in folder.iterdir():
        shutil.rmtree(path)
    return seconds, peak, cpu_s


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1.3, 5.2, 21.0])
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--limit_gib", type=float, default=2.0, help="of memory, for each process")
    chosen = parser.parse_args(argv)
    rows = []
    for gigabytes in chosen.gigabytes:
        slices = round(gigabytes * 1e9 / SIDE**2)
        with tempfile.TemporaryDirectory(prefix="unet-sizes-") as name, served((TILE,)) as url:
            seconds, peak, cpu_s = measure(Path(name), url, slices, chosen.processes, int(chosen.limit_gib * 2**30))
        rate = slices * SIDE**2 / seconds / 1e6
        rows.append(
            [f"{slices * SIDE**2 / 1e9:.1f}", f"{seconds:.0f}", f"{rate:.0f}", f"{cpu_s:.0f}", f"{peak / 2**20:.0f}"]
        )
        say(f"{gigabytes:g} GB: {seconds:.0f} s, {peak / 2**20:.0f} MiB")
    say(markdown(["GB", "s", "Mpx/s", "CPU s of the clients", "MiB, largest process"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
