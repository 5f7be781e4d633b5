"""The client from its wheel, in a fresh environment of another Python and NumPy, gives the same bytes as here."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from serve.server.process import TritonServer

# Other Pythons than this one, of which the newest installed is taken; they get the versions of constraints.lock.
NEWER = ("python3.14", "python3.13", "python3.12")
# What a machine without Linux's own modules and calls loads; the libraries themselves are loaded before.
ELSEWHERE = """
import os, subprocess, sys
import PIL.Image, numpy, psutil, scipy.ndimage, skimage, threadpoolctl, tifffile, tqdm, tritonclient.grpc
sys.platform = "win32"
sys.modules["fcntl"] = None
for name in ("pidfd_open", "posix_fallocate", "sched_getaffinity"):
    delattr(os, name)
from serve.client import main
main(["--help"])
"""


def uv(*words: object) -> None:
    program = Path(sys.executable).parent / "uv"
    done = subprocess.run([str(word) for word in (program, *words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the project, built in a copy of its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in ("unet", "train", "export", "serve", "tools"):
        shutil.copytree(project_root / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy2(project_root / name, folder)
    uv("build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir", folder, folder)
    (built,) = folder.glob("*.whl")
    return built


def newest_python() -> str:
    """The newest of the other Pythons that runs here, on the path or of pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for name in NEWER:
        for found in (shutil.which(name), *sorted(pyenv.glob(f"*/bin/{name}"))):
            if found and subprocess.run([found, "--version"], capture_output=True, check=False).returncode == 0:
                return str(found)
    pytest.skip(f"none of {', '.join(NEWER)} is installed")


@pytest.fixture(scope="module", params=["this Python, newest NumPy", "another Python"])
def environment(
    request: pytest.FixtureRequest, wheel: Path, project_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A fresh environment that holds the wheel without any extra; its folder of programs."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    if request.param == "another Python":
        python = newest_python()
        versions = ["--constraint", project_root / "constraints.lock"]
    else:
        python, versions = sys.executable, ["numpy>=2"]
    uv("venv", "--quiet", "--python", python, folder)
    uv("pip", "install", "--quiet", "--no-build", "--python", folder / "bin" / "python", *versions, wheel)
    return folder / "bin"


def run(environment: Path, tmp_path: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a program of an environment, in a folder that holds no module of the project."""
    line = [str(environment / str(words[0])), *(str(word) for word in words[1:])]
    return subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_it_segments_to_the_same_bytes(environment: Path, triton_server: TritonServer, tmp_path: Path) -> None:
    numpy = run(environment, tmp_path, "python", "-c", "import numpy; print(numpy.__version__)").stdout
    assert int(numpy.split(".")[0]) >= 2
    images = np.random.default_rng(0).integers(0, 256, (3, 150, 170), np.uint8)
    source = tmp_path / "stack.tif"
    tifffile.imwrite(source, images, photometric="minisblack")
    written = []
    for where, folder in ((environment, "there"), (Path(sys.executable).parent, "here")):
        words = (source, "--url", triton_server.settings.grpc_url, "--output_dir", tmp_path / folder)
        done = run(where, tmp_path, "unet-segment", *words)
        assert (done.returncode, done.stderr) == (0, "")
        written.append(tmp_path / folder / "stack-probability.tif")
    there, here = written
    np.testing.assert_array_equal(tifffile.imread(there), (images.astype(np.float16) * np.float16(1 / 255)))
    assert hashlib.sha256(there.read_bytes()).digest() == hashlib.sha256(here.read_bytes()).digest()


def test_help_needs_no_extra(environment: Path, tmp_path: Path) -> None:
    done = run(environment, tmp_path, "unet-segment", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: serve/client.py" in done.stdout


def test_what_needs_an_extra_says_so(environment: Path, tmp_path: Path) -> None:
    done = run(environment, tmp_path, "unet-train", "--model_dir", tmp_path / "result")
    assert done.returncode == 2
    assert done.stderr == "error: tensorflow is not installed: `pip install '.[train]'` brings it, on Python 3.11\n"


def test_nothing_that_only_linux_has_is_loaded(project_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=project_root, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: serve/client.py" in done.stdout
