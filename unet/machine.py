"""This machine: its cores and their instructions, the memory nodes that they lie on, and its NVIDIA GPUs."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TOOL_TIMEOUT_S = 30.0
_CGROUP = Path("/sys/fs/cgroup")
_NODES = Path("/sys/devices/system/node")
_CPUINFO = Path("/proc/cpuinfo")
# The values of ONEDNN_MAX_CPU_ISA that allow a kind of instructions beyond AVX2, and what the kernel calls it.
_AMX_LEVELS = ("AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX", "AVX10_1_512_AMX_FP16")
_BF16_LEVELS = ("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512", *_AMX_LEVELS)
_VNNI_LEVELS = ("AVX512_CORE_VNNI", *_BF16_LEVELS)
_INSTRUCTIONS = (
    ("avx2", "avx2", ("AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", *_VNNI_LEVELS)),
    ("avx512", "avx512bw", ("AVX512_CORE", *_VNNI_LEVELS)),
    ("vnni", "avx_vnni", ("AVX2_VNNI", "AVX2_VNNI_2", *_VNNI_LEVELS)),
    ("vnni", "avx512_vnni", _VNNI_LEVELS),
    ("bf16", "avx512_bf16", _BF16_LEVELS),
    ("amx", "amx_tile", _AMX_LEVELS),
)


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


def instruction_sets(cpuinfo: Path = _CPUINFO) -> tuple[str, ...]:
    """The instructions that libraries compute with here: of "avx2", "avx512", "vnni", "bf16" and "amx" those at hand.

    "vnni" multiplies 8-bit integers without saturating in between, "bf16" multiplies bfloat16, "amx" both, in tiles.
    The environment's ``ONEDNN_MAX_CPU_ISA``, which TensorFlow and OpenVINO obey, takes away what lies beyond it. Empty
    where the kernel lists none of them.

    Args:
        cpuinfo: the kernel's list; tests name another.
    """
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    most = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    unlimited = most in ("", "ALL", "DEFAULT")
    found = [name for name, flag, levels in _INSTRUCTIONS if flag in flags and (unlimited or most in levels)]
    return tuple(dict.fromkeys(found))


def processor_name(cpuinfo: Path = _CPUINFO) -> str:
    """What the processor calls itself.

    Args:
        cpuinfo: the kernel's list; tests name another.
    """
    name = platform.processor() or platform.machine()
    if not cpuinfo.is_file():
        return name
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)


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
