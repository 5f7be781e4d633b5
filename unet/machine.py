"""This machine: its cores and their instructions, the memory nodes that they lie on, and its NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

TOOL_TIMEOUT_S = 30.0
_CGROUP = Path("/sys/fs/cgroup")
_NODES = Path("/sys/devices/system/node")
_CPUINFO = Path("/proc/cpuinfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
# By which BLAS and OpenMP, TensorFlow and OpenCV are told how many threads to start.
_THREAD_VARIABLES = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
    *("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OPENCV_FOR_THREADS_NUM"),
)
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


def usable_cores(cgroup: Path = _CGROUP, membership: Path = _MEMBERSHIP) -> int:
    """Cores that this process may compute on: its CPU affinity, and no more than its container's quota; at least 1.

    Libraries look at the affinity alone: in a container that was given two cores they start a thread for every core of
    the host.

    Args:
        cgroup: where the control groups are mounted; tests name another.
        membership: the kernel's list of the groups that this process is in; tests name another.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cgroup, membership)
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _quota(cgroup: Path, membership: Path) -> float | None:
    """Cores' worth of time that the control groups grant, None where they set no limit.

    A group gets no more than the groups above it. A container sees its own group at the root, and below it those that
    a service manager makes in it; without a namespace of its own it reads the host's path, which does not exist there.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    groups = {cgroup, cgroup / "unified", cgroup / "cpu"}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        own = PurePosixPath(path.lstrip("/"))
        mounts = (cgroup, cgroup / "unified") if not controllers else (cgroup / "cpu", cgroup / controllers)
        if ".." not in own.parts and (not controllers or "cpu" in controllers.split(",")):
            groups |= {mount / above for mount in mounts for above in (own, *own.parents)}
    granted = [limit for group in groups if (limit := _limit(group)) is not None]
    return min(granted, default=None)


def _limit(group: Path) -> float | None:
    """Cores' worth of time that one control group grants, by version 2 or version 1, None where it sets no limit."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            # "max 100000" or "200000 100000"; in version 1 two files, in which -1 is no limit.
            granted, period = " ".join((group / name).read_text(encoding="utf-8") for name in names).split()
            return int(granted) / int(period) if granted not in ("max", "-1") else None
    return None


def thread_limit() -> int | None:
    """How many threads libraries may start, None where they find the right number themselves: no quota is set."""
    quota = _quota(_CGROUP, _MEMBERSHIP)
    return None if quota is None else usable_cores()


def limit_threads() -> None:
    """Hold the libraries of this process and of its children to the quota; where there is none, nothing changes.

    The user's own settings in the environment stay.
    """
    limit = thread_limit()
    if limit is None:
        return
    # Those that are loaded already have read their environment.
    if "OMP_NUM_THREADS" not in os.environ:
        import threadpoolctl

        threadpoolctl.threadpool_limits(limit)
    if "OPENCV_FOR_THREADS_NUM" not in os.environ and "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(limit)
    for name in _THREAD_VARIABLES:
        os.environ.setdefault(name, str(limit))


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


def cpu_amp_dtype() -> str:
    """The number format in which this processor is fastest at training: "bfloat16" if it is in hardware, or "float32".

    Emulated, bfloat16 takes three times as long as float32.
    """
    return "bfloat16" if {"bf16", "amx"} & set(instruction_sets()) else "float32"


@dataclass(frozen=True)
class Machine:
    """What figures were measured on.

    Attributes:
        cpu: what the processor calls itself.
        cores: that this process may use.
        instructions: that libraries compute with, see ``instruction_sets``.
        system: operating system and kernel.
    """

    cpu: str
    cores: int
    instructions: tuple[str, ...]
    system: str

    def __str__(self) -> str:
        known = f" with {', '.join(self.instructions)}" if self.instructions else ""
        return f"{self.cores} core{'s' * (self.cores > 1)} of {self.cpu}{known}"


def machine() -> Machine:
    """This machine, as this process may use it."""
    return Machine(processor_name(), usable_cores(), instruction_sets(), platform.platform())


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


def run_tool(*words: str, timeout_s: float = TOOL_TIMEOUT_S) -> str | None:
    """What a program prints, None where it is missing, fails, or is not done in time."""
    found = shutil.which(words[0]) or shutil.which(words[0], path=str(Path(sys.executable).parent))
    if found is None:
        return None
    try:
        done = subprocess.run([found, *words[1:]], capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
