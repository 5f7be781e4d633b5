"""Build Horovod against the installed TensorFlow, once: the wheel is kept for the next environment."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from tools import progress
from unet.errors import UnetError, command
from unet.machine import usable_cores

if TYPE_CHECKING:
    from collections.abc import Sequence

LOG = Path(".cache/install/horovod.log")
BUILD_S, INSTALL_S = 75, 3
# Horovod's build makes Gloo twice, and everything with debugging symbols; this makes only what TensorFlow loads.
CMAKE = """#!/bin/sh
case "$1" in
--version) exec cmake "$@" ;;
--build) shift; folder=$1; shift; exec cmake --build "$folder" --target tensorflow "$@" ;;
*) exec cmake "$@" "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O2 -DNDEBUG" ;;
esac
"""


class BuildError(UnetError):
    """Horovod could not be built."""


def build_environment(folder: Path, *, gpu: bool) -> dict[str, str]:
    """The variables that make Horovod's build take TensorFlow and Gloo, and NCCL on a machine with a GPU.

    Args:
        folder: takes the cmake that builds only what is used.
        gpu: build for GPUs, with everything that Horovod's own build makes.
    """
    chosen = {
        "HOROVOD_WITH_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_PYTORCH": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1",
        # CMake 4 refuses the policy version of the bundled libraries.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
        "MAKEFLAGS": f"-j{usable_cores()}",
    }
    if gpu:
        return {**chosen, "HOROVOD_GPU_OPERATIONS": "NCCL"}
    cmake = folder / "cmake-for-horovod"
    cmake.write_text(CMAKE, encoding="utf-8")
    cmake.chmod(0o755)
    return {**chosen, "HOROVOD_WITHOUT_MPI": "1", "HOROVOD_CMAKE": str(cmake)}


def install(wanted: str, wheels: Path) -> None:
    """Install Horovod ``wanted`` from ``wheels``, after building it there if it is not there yet.

    Raises:
        BuildError: if pip cannot build it.
    """
    if _installed() == wanted:
        return
    gpu = shutil.which("nvcc") is not None and shutil.which("nvidia-smi") is not None
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    folder = wheels / f"horovod-{wanted}-{python}-tensorflow-{version('tensorflow')}-{'nccl' if gpu else 'gloo'}"
    if not list(folder.glob("*.whl")):
        title = f"building Horovod {wanted} against TensorFlow {version('tensorflow')}, only once"
        words = ("wheel", "--no-binary", "horovod", "-w", str(folder), f"horovod=={wanted}")
        _pip(title, BUILD_S, *words, gpu=gpu)
    _pip("installing Horovod", INSTALL_S, "install", *(str(path) for path in folder.glob("*.whl")), gpu=gpu)


def _installed() -> str | None:
    try:
        return version("horovod")
    except PackageNotFoundError:
        return None


def _pip(title: str, expected_s: float, verb: str, *arguments: str, gpu: bool) -> None:
    line = [sys.executable, "-m", "pip", verb, "--no-build-isolation", "--no-deps", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **build_environment(Path(folder), gpu=gpu)}
        if progress.run(line, title, LOG, expected_s, env=environment):
            raise BuildError(f"Horovod could not be installed; what pip said is in {LOG}")


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
