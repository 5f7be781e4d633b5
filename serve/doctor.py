"""What this machine can do for the project, and what to install for more: ``unet-doctor`` or ``make doctor``.

It also runs where nothing is installed yet: a package that is missing is a finding.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

# So that it runs as a file without an installation: what needs packages is imported where it is looked at.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from serve.models.library import own_library
from serve.server.install import TritonError, find_installation
from serve.server.offers import (
    ABSENT,
    OK,
    SHARED_MEMORY_REMEDY,
    WRONG,
    Finding,
    look_at_cores,
    look_at_docker,
    look_at_gpus,
    look_at_horovod,
    look_at_package,
    look_at_packages,
    look_at_python,
    look_at_tensorrt,
    version_of,
)
from serve.server.regions import SHARED_MEMORY, is_of_dead_client
from serve.server.state import load_state
from unet.card import Card, CardError
from unet.config import FlagParser
from unet.engine import EngineError
from unet.errors import command, say
from unet.files.demo import own_or_demo
from unet.machine import TOOL_TIMEOUT_S, Gpu
from unet.names import PLAN_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence

_INSTALL = "make install, or pip install '.[serve]'"
_LEAST_SHARED_MIB = 64


def examine(artefacts: Path, state_dir: Path) -> list[Finding]:
    """Look at everything.

    Args:
        artefacts: folder whose card is compared with this machine.
        state_dir: where Triton's backends are laid out, and where the running server's state is.
    """
    gpus, gpu_findings = look_at_gpus()
    return [
        look_at_python(),
        look_at_packages(),
        look_at_cores(),
        look_at_engines(),
        *gpu_findings,
        look_at_tensorrt(gpus),
        look_at_triton(state_dir),
        look_at_perf_analyzer(),
        look_at_package("TensorFlow", "tensorflow", "training and export need it", "pip install '.[train]'"),
        look_at_horovod(bool(gpus)),
        look_at_docker(bool(gpus)),
        look_at_shared_memory(),
        look_at_server(state_dir),
        look_at_card(artefacts, gpus),
    ]


def look_at_engines() -> Finding:
    """The engines that compute natively on this CPU."""
    try:
        from unet.engine.cpu import supported_choices
    except ImportError as error:
        return Finding("CPU engines", WRONG, f"{error.name} is not installed", _INSTALL)
    try:
        return Finding("CPU engines", OK, ", ".join(str(choice) for choice in supported_choices()))
    except EngineError as error:
        return Finding("CPU engines", WRONG, str(error))


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
    about = f"tritonserver of nvidia-pytriton {installation.version}: --profile cpu"
    if own_library().is_file():
        return Finding("Triton", OK, f"{about}, our own backend for OpenVINO")
    return Finding("Triton", OK, f"{about}, python backend alone", "make install builds our own, a little faster")


def look_at_perf_analyzer() -> Finding:
    """Whether NVIDIA's benchmark runs."""
    try:
        from serve.measure.common import MeasureError
        from serve.measure.perf_analyzer import PerfAnalyzer
    except ImportError as error:
        return Finding("perf_analyzer", ABSENT, f"{error.name} is not installed", _INSTALL)
    try:
        PerfAnalyzer(Path("benchmark"))
    except MeasureError as error:
        return Finding("perf_analyzer", ABSENT, str(error))
    return Finding("perf_analyzer", OK, f"of tritonclient {version_of('tritonclient')}")


def look_at_shared_memory() -> Finding:
    """Whether the python backend and the client have room in /dev/shm, and what killed clients have left there."""
    try:
        free_mib = shutil.disk_usage(SHARED_MEMORY).free >> 20
        left = [path.stat().st_size for path in SHARED_MEMORY.iterdir() if is_of_dead_client(path.name)]
    except OSError as error:
        return Finding("/dev/shm", WRONG, f"it cannot be used: {error.strerror}", "mount a tmpfs there")
    fact = f"{free_mib} MiB free"
    if left:
        fact += f", {sum(left) >> 20} MiB left by killed clients, which the next client removes"
    if free_mib >= _LEAST_SHARED_MIB:
        return Finding("/dev/shm", OK, fact)
    return Finding("/dev/shm", WRONG, fact, SHARED_MEMORY_REMEDY)


def look_at_server(state_dir: Path) -> Finding:
    """The server that was started with a state folder, and the shared memory that it still holds for killed clients."""
    item = "server"
    try:
        state = load_state(state_dir)
    except TritonError as error:
        return Finding(item, WRONG, str(error))
    if state is None or not state.is_kept:
        return Finding(item, ABSENT, "none runs", "make serve starts one")
    fact = f"process {state.server_pid}, gRPC {state.grpc_url}"
    if not state.is_ready:
        return Finding(item, WRONG, f"{fact}, not ready", f"see its log, {state.log}")
    try:
        held = state.regions.of_dead_clients()
    except (OSError, ValueError, KeyError):
        return Finding(item, OK, fact)
    if not held:
        return Finding(item, OK, fact)
    fact += f", holds {sum(held.values()) >> 20} MiB of shared memory for killed clients"
    return Finding(item, OK, fact, "it releases them within seconds")


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
        from unet.engine.cpu import engine_here
    except ImportError as error:
        return Finding(item, ABSENT, f"{artefacts}: not compared, {error.name} is not installed", _INSTALL)
    try:
        engine = engine_here(card)
    except EngineError as error:
        return Finding(item, WRONG, str(error))
    fits, made = engine == card.engine, f"{card.engine.kind} {card.engine.precision}"
    remedy = "" if fits else f"not proven on such a CPU, {engine.kind} {engine.precision} serves: export here"
    return Finding(item, OK if fits else WRONG, f"{artefacts}: {made}, tiles of {list(card.tile_sizes)}", remedy)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print one line for each item; 1 if something has to be mended."""
    parser = FlagParser(prog="unet-doctor", description=__doc__)
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder whose card is compared")
    parser.add_argument(
        "--state_dir", "--cache_dir", type=Path, default=Path(".cache/triton"), help="of the server that may run"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    chosen = parser.parse_args(argv)
    findings = examine(own_or_demo(chosen.artefacts, "artefacts"), chosen.state_dir.resolve())
    if chosen.json:
        say(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            say(str(finding))
    return int(any(finding.state == WRONG for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
