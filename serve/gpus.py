"""The NVIDIA GPUs of this machine, and what other programs say about it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TOOL_TIMEOUT_S = 30.0


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
