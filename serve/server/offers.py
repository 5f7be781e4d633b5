"""What this machine has for the project: Python, processor, GPUs, containers. Needs the standard library alone."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from unet.engine.targets import LEAST_DRIVER, TARGETS, TENSORFLOW_CUDA, TENSORRT, TRITON, same_release, target_of
from unet.machine import Gpu, cpu_amp_dtype, instruction_sets, machine, numa_nodes, parse_gpus, run_tool

if TYPE_CHECKING:
    from collections.abc import Sequence

OK, ABSENT, WRONG = "ok", "absent", "wrong"
SHARED_MEMORY_REMEDY = "give it 256 MiB (docker run --shm-size=256m, or mount -o remount,size=256m /dev/shm)"
_PYTHONS = ((3, 9), (3, 11))
# Without these nothing of the project runs, by the names under which Python imports them.
_PACKAGES = ("numpy", "PIL", "psutil", "scipy", "skimage", "tifffile", "tqdm", "google.protobuf", "tritonclient")
# Number formats of the CPU engine, and the instructions of which one is enough for each.
_NATIVE = (("bf16", {"bf16", "amx"}), ("int8", {"vnni", "amx"}))
# TensorFlow alone took 20 s to load on two busy cores.
_HOROVOD_TIMEOUT_S = 120.0
_ASK_HOROVOD = """
import horovod.tensorflow as hvd
print(*(name for name in ("MPI", "Gloo", "NCCL") if getattr(hvd, name.lower() + "_built")()))
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        item: what was looked at.
        state: "ok"; "absent", which only closes a way that needs it; or "wrong", which has to be mended.
        fact: what was found.
        remedy: what to do, if anything.
    """

    item: str
    state: str
    fact: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:6} {self.item:18} {self.fact}"
        return f"{line}; {self.remedy}" if self.remedy else line


def look_at_python() -> Finding:
    """The Python that runs this."""
    fits = _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]
    return Finding("Python", OK if fits else WRONG, platform.python_version(), "" if fits else "use 3.9, 3.10 or 3.11")


def look_at_packages() -> Finding:
    """Whether the packages are there that everything needs."""
    missing = [name for name in _PACKAGES if not _is_installed(name)]
    if missing:
        return Finding("packages", WRONG, f"missing: {', '.join(missing)}", "make install, or pip install '.[serve]'")
    return Finding("packages", OK, "all that segmenting and serving need")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # not even the package that holds it
        return False


def look_at_cores() -> Finding:
    """What there is to compute with on the CPU, and what follows from its instructions."""
    nodes, sets = numa_nodes(), set(instruction_sets())
    native = [name for name, needs in _NATIVE if needs & sets]
    serves = f"it serves natively in {' and '.join(native)}" if native else "it serves in f32, at about half the speed"
    fact = f"{machine()}, on {nodes} memory node{'s' * (nodes > 1)}"
    return Finding("CPU", OK, fact, f"--use_amp trains in {cpu_amp_dtype()}, {serves}")


def look_at_gpus() -> tuple[list[Gpu], list[Finding]]:
    """The GPUs that the NVIDIA driver knows, with a line for driver and compute capability."""
    said = run_tool(
        "nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader,nounits"
    )
    if said is None:
        why = "no NVIDIA driver answers" if shutil.which("nvidia-smi") else "no NVIDIA driver (nvidia-smi) is installed"
        remedy = f"the CPU profile needs none; for the GPU profiles install NVIDIA's driver {LEAST_DRIVER} or newer"
        return [], [
            Finding("GPU", ABSENT, why, remedy),
            Finding("driver", ABSENT, "none"),
            Finding("compute capability", ABSENT, "none"),
        ]
    gpus = parse_gpus(said)
    driver = gpus[0].driver
    new_enough = int(driver.split(".")[0]) >= LEAST_DRIVER
    return gpus, [
        Finding("GPU", OK, ", ".join(f"{gpu.name}, {gpu.memory_mib} MiB" for gpu in gpus)),
        Finding(
            "driver",
            OK if new_enough else WRONG,
            driver,
            "" if new_enough else f"CUDA {TENSORFLOW_CUDA} wants {LEAST_DRIVER} or newer",
        ),
        *(_judge_capability(gpu) for gpu in gpus),
    ]


def _judge_capability(gpu: Gpu) -> Finding:
    item, fact = "compute capability", f"{gpu.compute_capability:g} ({gpu.name})"
    target = target_of(f"{gpu.compute_capability:.1f}")
    if target is None:
        known = ", ".join(one.compute_capability for one in TARGETS.values())
        return Finding(item, WRONG, fact, f"Triton {TRITON} serves plans for {known}: use --profile cpu")
    words = f"--target {target.name}, --profile {target.profile}; TensorRT {target.tensorrt} and Triton {target.triton}"
    return Finding(item, OK, fact, words)


def look_at_tensorrt(gpus: Sequence[Gpu]) -> Finding:
    """Whether plans can be built here, by trtexec or from Python."""
    trtexec = shutil.which("trtexec")
    if trtexec is not None:
        return Finding("TensorRT", OK, f"trtexec is {trtexec}", f"its plans are served only if it is {TENSORRT}")
    if (found := version_of("tensorrt")) is not None:
        fits = same_release(found, TENSORRT)
        remedy = "" if fits else f"Triton {TRITON} loads plans of {TENSORRT} alone: pip install tensorrt=={TENSORRT}"
        return Finding("TensorRT", OK if fits else WRONG, found, remedy)
    if (found := version_of("tensorrt-rtx-cu12") or version_of("tensorrt_rtx")) is not None:
        return Finding("TensorRT", OK, f"TensorRT-RTX {found}, for compute capability 7.5 and newer")
    remedy = (
        f"pip install '.[gpu]', or build the plan in the container nvcr.io/nvidia/tensorrt:{TRITON}-py3"
        if gpus
        else "only the GPU profiles need it"
    )
    return Finding("TensorRT", ABSENT, "not installed", remedy)


def look_at_package(item: str, package: str, purpose: str, remedy: str) -> Finding:
    """Whether a package is installed."""
    found = version_of(package)
    return Finding(item, OK, found) if found else Finding(item, ABSENT, "not installed", f"{purpose}: {remedy}")


def look_at_horovod(gpu: bool) -> Finding:
    """Whether training goes over several processes, and over NCCL where there are GPUs."""
    found = version_of("horovod")
    if found is None:
        return Finding("Horovod", ABSENT, "not installed", "training on one process needs none; else: make install")
    # `horovodrun --check-build` asks the same five times, each time in a new process.
    said = run_tool(sys.executable, "-c", _ASK_HOROVOD, timeout_s=_HOROVOD_TIMEOUT_S)
    if said is None:
        remedy = "see why with python -c 'import horovod.tensorflow'; make install builds it again"
        return Finding("Horovod", WRONG, f"{found} does not load within {_HOROVOD_TIMEOUT_S:.0f} s", remedy)
    built = [name for name in ("MPI", "Gloo", "NCCL") if name in said.split()]
    fact = f"{found} with {' and '.join(built) or 'nothing to communicate by'}"
    if gpu and "NCCL" not in built:
        return Finding("Horovod", WRONG, fact, "for the GPUs: HOROVOD_GPU_OPERATIONS=NCCL, see docker/Dockerfile.train")
    return Finding("Horovod", OK if built else WRONG, fact, "" if built else "make install builds it again")


def look_at_docker(gpu: bool) -> Finding:
    """Whether containers can be run, which the GPU profiles are served in."""
    said = run_tool("docker", "compose", "version", "--short")
    if said is None:
        return Finding("Docker", ABSENT, "docker compose does not answer", "only the GPU profiles need it")
    runtimes = run_tool("docker", "info", "--format", "{{json .Runtimes}}")
    if runtimes is None:
        return Finding("Docker", WRONG if gpu else ABSENT, f"compose {said.strip()}, but no engine answers", "start it")
    if gpu and "nvidia" not in runtimes:
        return Finding("Docker", WRONG, f"compose {said.strip()}", "install the NVIDIA Container Toolkit")
    return Finding("Docker", OK, f"compose {said.strip()}")


def version_of(package: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
