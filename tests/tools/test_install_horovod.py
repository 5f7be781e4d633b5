"""What of Horovod is built: for TensorFlow with Gloo, nothing that is not loaded."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools.install_horovod import build_environment

PROJECT = """
cmake_minimum_required(VERSION 3.13)
project(two CXX)
foreach(name tensorflow unused)
  file(WRITE ${CMAKE_BINARY_DIR}/${name}.cc "int ${name}() { return 0; }")
  add_library(${name} SHARED ${CMAKE_BINARY_DIR}/${name}.cc)
endforeach()
"""


@pytest.mark.parametrize(
    ("gpu", "key", "value"), [(True, "HOROVOD_GPU_OPERATIONS", "NCCL"), (False, "HOROVOD_WITHOUT_MPI", "1")]
)
def test_build_takes_nccl_only_with_a_gpu(tmp_path: Path, gpu: bool, key: str, value: str) -> None:
    assert build_environment(tmp_path, gpu=gpu)[key] == value
    assert build_environment(tmp_path, gpu=not gpu).get(key) is None


def test_only_the_library_for_tensorflow_is_built(tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    cmake = build_environment(tmp_path, gpu=False)["HOROVOD_CMAKE"]
    build = tmp_path / "build"
    build.mkdir()
    assert "cmake version" in subprocess.run([cmake, "--version"], capture_output=True, text=True, check=True).stdout
    # As Horovod's setup.py calls it.
    subprocess.run([cmake, "..", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"], cwd=build, check=True, capture_output=True)
    line = [cmake, "--build", ".", "--config", "RelWithDebInfo", "--", "VERBOSE=1"]
    subprocess.run(line, cwd=build, check=True, capture_output=True)
    assert [path.name for path in build.glob("*.so")] == ["libtensorflow.so"]
    sections = subprocess.run(["objdump", "-h", build / "libtensorflow.so"], capture_output=True, text=True, check=True)
    assert ".debug_info" not in sections.stdout
