"""What this machine can do for the project, and what to install for more: ``unet-doctor`` or ``make doctor``."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from serve.measure.common import MeasureError
from serve.measure.perf_analyzer import PerfAnalyzer
from serve.server.install import TritonError, find_installation
from unet.card import Card, CardError
from unet.engine import EngineError
from unet.engine.cpu import engine_here, supported_choices
from unet.engine.targets import TARGETS, TRITON, target_of
from unet.errors import command, say
from unet.machine import TOOL_TIMEOUT_S, Gpu, cpu_amp_dtype, machine, numa_nodes, parse_gpus, run_tool
from unet.names import PLAN_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

OK, ABSENT, WRONG = "ok", "absent", "wrong"
_PYTHONS = ((3, 9), (3, 11))
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


def examine(artefacts: Path, cache_dir: Path) -> list[Finding]:
    """Look at everything.

    Args:
        artefacts: folder whose card is compared with this machine.
        cache_dir: where Triton's backends are laid out.
    """
    gpus, gpu_findings = look_at_gpus()
    return [
        look_at_python(),
        look_at_cores(),
        look_at_engines(),
        *gpu_findings,
        look_at_tensorrt(gpus),
        look_at_triton(cache_dir),
        look_at_perf_analyzer(),
        look_at_package("TensorFlow", "tensorflow", "training and export need it", "pip install '.[train]'"),
        look_at_horovod(bool(gpus)),
        look_at_docker(bool(gpus)),
        look_at_shared_memory(),
        look_at_card(artefacts, gpus),
    ]


def look_at_python() -> Finding:
    """The Python that runs this."""
    fits = _PYTHONS[0] <= sys.version_info[:2] <= _PYTHONS[1]
    return Finding("Python", OK if fits else WRONG, platform.python_version(), "" if fits else "use 3.9, 3.10 or 3.11")


def look_at_cores() -> Finding:
    """What there is to compute with on the CPU, and what follows from its instructions."""
    trains = f"--use_amp trains in {cpu_amp_dtype()}"
    return Finding("CPU", OK, f"{machine()}, on {numa_nodes()} memory node(s); {trains}")


def look_at_engines() -> Finding:
    """The engines that compute natively on this CPU."""
    try:
        return Finding("CPU engines", OK, ", ".join(str(choice) for choice in supported_choices()))
    except EngineError as error:
        return Finding("CPU engines", WRONG, str(error))


def look_at_gpus() -> tuple[list[Gpu], list[Finding]]:
    """The GPUs that the NVIDIA driver knows, with a line for driver and compute capability."""
    said = run_tool(
        "nvidia-smi", "--query-gpu=name,driver_version,compute_cap,memory.total", "--format=csv,noheader,nounits"
    )
    if said is None:
        why = "no NVIDIA driver answers" if shutil.which("nvidia-smi") else "no NVIDIA driver (nvidia-smi) is installed"
        remedy = "the CPU profile needs none; for the GPU profiles install NVIDIA's driver 535 or newer"
        return [], [
            Finding("GPU", ABSENT, why, remedy),
            Finding("driver", ABSENT, "none"),
            Finding("compute capability", ABSENT, "none"),
        ]
    gpus = parse_gpus(said)
    driver = gpus[0].driver
    new_enough = int(driver.split(".")[0]) >= 535
    return gpus, [
        Finding("GPU", OK, ", ".join(f"{gpu.name}, {gpu.memory_mib} MiB" for gpu in gpus)),
        Finding("driver", OK if new_enough else WRONG, driver, "" if new_enough else "CUDA 12.2 wants 535 or newer"),
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
        return Finding("TensorRT", OK, f"trtexec is {trtexec}")
    if (found := _version("tensorrt")) is not None:
        return Finding("TensorRT", OK, found)
    if (found := _version("tensorrt-rtx-cu12") or _version("tensorrt_rtx")) is not None:
        return Finding("TensorRT", OK, f"TensorRT-RTX {found}, for compute capability 7.5 and newer")
    remedy = (
        "pip install '.[gpu]', or build the plan in the container nvcr.io/nvidia/tensorrt:24.09-py3"
        if gpus
        else "only the GPU profiles need it"
    )
    return Finding("TensorRT", ABSENT, "not installed", remedy)


def look_at_triton(cache_dir: Path) -> Finding:
    """Whether the wheel's tritonserver starts: its libraries are found, and it says which it is."""
    try:
        installation = find_installation(cache_dir)
        done = subprocess.run(
            [str(installation.server), "--help"],
            env=installation.environment(),
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT_S,
            check=False,
        )
    except (TritonError, OSError, subprocess.TimeoutExpired) as error:
        return Finding("Triton", WRONG, str(error))
    if "--model-repository" not in done.stdout + done.stderr:
        return Finding(
            "Triton",
            WRONG,
            f"{installation.server} does not start: {(done.stderr or done.stdout).strip().splitlines()[-1]}",
            "pip install --force-reinstall '.[serve]'",
        )
    return Finding(
        "Triton", OK, f"tritonserver of nvidia-pytriton {installation.version}, python backend: --profile cpu"
    )


def look_at_perf_analyzer() -> Finding:
    """Whether NVIDIA's benchmark runs."""
    try:
        PerfAnalyzer(Path("benchmark"))
    except MeasureError as error:
        return Finding("perf_analyzer", ABSENT, str(error))
    return Finding("perf_analyzer", OK, f"of tritonclient {_version('tritonclient')}")


def look_at_package(item: str, package: str, purpose: str, remedy: str) -> Finding:
    """Whether a package is installed."""
    found = _version(package)
    return Finding(item, OK, found) if found else Finding(item, ABSENT, "not installed", f"{purpose}: {remedy}")


def look_at_horovod(gpu: bool) -> Finding:
    """Whether training goes over several processes, and over NCCL where there are GPUs."""
    found = _version("horovod")
    if found is None:
        return Finding("Horovod", ABSENT, "not installed", "training on one process needs none; else: make install")
    # `horovodrun --check-build` asks the same five times, each time in a new process.
    said = run_tool(sys.executable, "-c", _ASK_HOROVOD) or ""
    built = [name for name in ("MPI", "Gloo", "NCCL") if name in said.split()]
    fact = f"{found} with {' and '.join(built) or 'nothing to communicate by'}"
    if gpu and "NCCL" not in built:
        return Finding("Horovod", WRONG, fact, "for the GPUs: HOROVOD_GPU_OPERATIONS=NCCL, see docker/Dockerfile.train")
    return Finding("Horovod", OK if built else WRONG, fact, "" if built else "make install builds it anew")


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


def look_at_shared_memory() -> Finding:
    """Whether the python backend and the client have room in /dev/shm."""
    try:
        free_mib = shutil.disk_usage("/dev/shm").free >> 20
    except OSError:
        return Finding("/dev/shm", WRONG, "there is none", "mount a tmpfs there")
    enough = free_mib >= 64
    return Finding("/dev/shm", OK if enough else WRONG, f"{free_mib} MiB free", "" if enough else "give it 256 MiB")


def look_at_card(artefacts: Path, gpus: Sequence[Gpu]) -> Finding:
    """Whether what was exported fits this machine."""
    item = "artefacts"
    try:
        card = Card.load(artefacts)
    except CardError as error:
        return Finding(item, ABSENT, str(error))
    plans = [artefact for artefact in card.artefacts.values() if artefact.file == PLAN_FILE]
    if plans:
        wanted = str(plans[0].facts.get("compute_capability", ""))
        fact = f"{artefacts}: plan for compute capability {wanted or 'unknown'}"
        if not gpus:
            return Finding(item, ABSENT, fact, "there is no GPU here: export with --target cpu to serve it here")
        if wanted and all(f"{gpu.compute_capability:g}" != f"{float(wanted):g}" for gpu in gpus):
            have = ", ".join(f"{gpu.compute_capability:g}" for gpu in gpus)
            return Finding(item, WRONG, fact, f"this machine has {have}: build the plan here")
        return Finding(item, OK, fact)
    if not card.has_engine:
        return Finding(
            item, ABSENT, f"{artefacts}: no engine for a CPU and no plan", "run build_plan.sh on the GPU's machine"
        )
    try:
        engine = engine_here(card)
    except EngineError as error:
        return Finding(item, WRONG, str(error))
    fits, made = engine == card.engine, f"{card.engine.kind} {card.engine.precision}"
    remedy = "" if fits else f"not proven on such a CPU, {engine.kind} {engine.precision} serves: export here"
    return Finding(item, OK if fits else WRONG, f"{artefacts}: {made}, tiles of {list(card.tile_sizes)}", remedy)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for each item; 1 if something has to be mended."""
    parser = argparse.ArgumentParser(
        prog="unet-doctor", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder whose card is compared")
    parser.add_argument("--cache_dir", type=Path, default=Path(".cache/triton"), help="for Triton's backends")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    chosen = parser.parse_args(argv)
    findings = examine(chosen.artefacts, chosen.cache_dir.resolve())
    if chosen.json:
        say(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            say(str(finding))
    return int(any(finding.state == WRONG for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
