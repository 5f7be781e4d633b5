"""This machine: the cores that a process may use, the memory nodes that they lie on, and its NVIDIA GPUs."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TOOL_TIMEOUT_S = 30.0
_CGROUP = Path("/sys/fs/cgroup")
_NODES = Path("/sys/devices/system/node")


def usable_cores(cgroup: Path = _CGROUP) -> int:
    """Cores that this process may compute on: its CPU affinity, and no more than its container's quota; at least 1.

    Libraries ask for the affinity alone and start a thread for every core of the host in a container that was given
    two of them.

    Args:
        cgroup: where the control group is mounted; tests name another.
    """
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(cgroup)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota(cgroup: Path) -> float | None:
    """Cores' worth of time that the control group grants, None where it sets no limit."""
    try:  # version 2: "max 100000" or "200000 100000"
        granted, period = (cgroup / "cpu.max").read_text(encoding="utf-8").split()
        return None if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError):
        pass
    try:  # version 1: -1 is no limit
        microseconds = int((cgroup / "cpu" / "cpu.cfs_quota_us").read_text(encoding="utf-8"))
        period_us = int((cgroup / "cpu" / "cpu.cfs_period_us").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return microseconds / period_us if microseconds > 0 else None


def numa_nodes(nodes: Path = _NODES) -> int:
    """Memory nodes that hold cores of this process's affinity; at least 1.

    Args:
        nodes: where the kernel lists them; tests name another.
    """
    allowed = os.sched_getaffinity(0)
    found = 0
    for listing in nodes.glob("node[0-9]*/cpulist"):
        found += bool(allowed & _cores(listing.read_text(encoding="utf-8")))
    return max(1, found)


def _cores(listing: str) -> set[int]:
    """The numbers in the kernel's notation, as in "0-3,8"."""
    cores: set[int] = set()
    for part in filter(None, listing.strip().split(",")):
        first, _, last = part.partition("-")
        cores |= set(range(int(first), int(last or first) + 1))
    return cores


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU, as its driver describes it."""

    name: str
    driver: str
    compute_capability: float
    memory_mib: int


def parse_gpus(said: str) -> list[Gpu]:
    """The lines of nvidia-smi's table: name, driver, compute capability, MiB."""
    rows = [[cell.strip() for cell in line.rsplit(",", 3)] for line in said.splitlines() if line.strip()]
    return [Gpu(name, driver, float(capability), int(memory)) for name, driver, capability, memory in rows]


def run_tool(*words: str) -> str | None:
    """What a program prints, None where it is missing or fails."""
    found = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent))
    if found is None:
        return None
    try:
        done = subprocess.run([found, *words[1:]], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
