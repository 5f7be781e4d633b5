"""Build Horovod against the installed TensorFlow, once: the wheel is kept for the next environment."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from unet.errors import UnetError, command, say
from unet.machine import usable_cores

if TYPE_CHECKING:
    from collections.abc import Sequence


class BuildError(UnetError):
    """Horovod could not be built."""


def build_environment(*, gpu: bool) -> dict[str, str]:
    """The variables that make Horovod's build take TensorFlow and Gloo, and NCCL on a machine with a GPU."""
    chosen = {
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        # CMake 4 refuses the policy version of the bundled libraries.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{usable_cores()}",
    }
    chosen["HOROVOD_GPU_OPERATIONS" if gpu else "HOROVOD_WITHOUT_MPI"] = "NCCL" if gpu else "1"
    return chosen


def install(wanted: str, wheels: Path) -> None:
    """Install Horovod ``wanted`` from ``wheels``, after building it there if it is not there yet.

    Raises:
        BuildError: if pip cannot build it; the log's end is in the message.
    """
    if _installed() == wanted:
        return
    gpu = shutil.which("nvcc") is not None and shutil.which("nvidia-smi") is not None
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = wheels / f"horovod-{wanted}-{python}-tensorflow-{version('tensorflow')}-{'nccl' if gpu else 'gloo'}"
    if not list(folder.glob("*.whl")):
        say(f"building Horovod {wanted} against TensorFlow {version('tensorflow')} (about three minutes, only once)")
        _pip("wheel", "--no-binary", "horovod", "-w", str(folder), f"horovod=={wanted}", gpu=gpu)
    _pip("install", *(str(path) for path in folder.glob("*.whl")), gpu=gpu)


def _installed() -> str | None:
    try:
        return version("horovod")
    except PackageNotFoundError:
        return None


def _pip(verb: str, *arguments: str, gpu: bool) -> None:
    line = [sys.executable, "-m", "pip", verb, "-q", "--no-build-isolation", "--no-deps", *arguments]
    done = subprocess.run(
        line, env={**os.environ, **build_environment(gpu=gpu)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise BuildError(f"pip {verb} of Horovod failed; the end of its output was:\n{tail}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Install Horovod into the running environment."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", required=True, help="Horovod's version")
    parser.add_argument("--wheels", type=Path, required=True, help="folder in which built wheels are kept")
    chosen = parser.parse_args(argv)
    install(chosen.version, chosen.wheels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
