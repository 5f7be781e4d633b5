"""Tiles in a GPU's memory: what tritonclient's real module allows here, up to the driver, which there is none of."""

from __future__ import annotations

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import tritonclient

from serve import Segmenter
from serve.client import main
from serve.server.process import TritonServer
from unet.files import atomic_directory

# NVIDIA's; tritonclient imports `cuda.cudart`, which 13 has no more.
CUDA_PYTHON = "cuda-python==12.9.4"
MODULE = Path(tritonclient.__file__).parent / "utils" / "cuda_shared_memory" / "__init__.py"
without_gpu = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    path = tmp_path / "volume.tif"
    images = np.random.default_rng(0).integers(0, 256, (2, 60, 80), np.uint8)
    tifffile.imwrite(path, images, photometric="minisblack")
    return path


@pytest.fixture(scope="module")
def cuda_python(project_root: Path) -> Path:
    """A folder for PYTHONPATH, kept from one run to the next."""
    folder = project_root / ".cache" / CUDA_PYTHON
    if not folder.exists():
        with atomic_directory(folder) as aside:
            line = [sys.executable, "-m", "pip", "install", "-q", "--target", str(aside), CUDA_PYTHON]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"{CUDA_PYTHON} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
    return folder


def wrong_calls(source: str) -> list[str]:
    """Calls of ``self._cuda`` that the functions of tritonclient's module do not take."""
    functions = {
        node.name: len(node.args.args) - len(node.args.defaults)
        for node in ast.parse(MODULE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self._cuda."):
            name = ast.unparse(node.func).rpartition(".")[2]
            if node.keywords or functions.get(name) != len(node.args):
                found.append(ast.unparse(node))
    return found


def test_every_call_is_one_that_tritonclient_takes(project_root: Path) -> None:
    source = (project_root / "serve" / "segment" / "cuda_slot.py").read_text(encoding="utf-8")
    assert source.count("self._cuda.") >= 6
    assert wrong_calls(source) == []
    for right, wrong in (
        ("size, _DEVICE)\n            handle", "size)\n            handle"),
        ("get_raw_handle", "raw_handle"),
        ("[self.images[:count]])", "self.images, 0)"),
    ):
        assert right in source
        assert len(wrong_calls(source.replace(right, wrong))) == 1


@pytest.mark.skipif(importlib.util.find_spec("cuda") is not None, reason="cuda-python is installed")
def test_without_cuda_python_it_says_what_to_install(
    triton_server: TritonServer, volume: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(volume), "--url", triton_server.settings.grpc_url, "--quiet", "--shared_memory", "cuda"]
    assert main(line) == 2
    said = capsys.readouterr().err
    assert "cuda-python cannot be loaded (No module named 'cuda'): on a machine with an NVIDIA GPU, pip install" in said
    assert len(said.splitlines()) == 1
    assert not volume.with_name("volume-probability.tif").exists()


@without_gpu
def test_without_a_gpu_tritonclients_own_error_becomes_one_sentence(
    triton_server: TritonServer, volume: Path, cuda_python: Path, project_root: Path
) -> None:
    words = [str(volume), "--url", triton_server.settings.grpc_url, "--quiet", "--shared_memory", "cuda"]
    environment = {**os.environ, "PYTHONPATH": str(cuda_python), "PYTHONWARNINGS": "ignore"}
    line = [sys.executable, str(project_root / "serve" / "client.py"), *words]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the GPU's memory cannot be used: unable to create cuda shared memory handle" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.gpu
def test_tiles_in_gpu_memory_give_the_same_answers(triton_server: TritonServer) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 90, 110), np.uint8)
    url = triton_server.settings.grpc_url
    with Segmenter(url, shared_memory="cuda") as cuda, Segmenter(url, shared_memory="off") as sent:
        for found, due in zip(cuda.segment(images), sent.segment(images)):
            np.testing.assert_array_equal(found, due)
