"""Servers that are started as a user starts them, and what the tests ask of them."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.settings import ServerSettings
from serve.server.state import ServerState, load_state

MakeSettings = Callable[..., ServerSettings]
TIMEOUT_S = 60.0
ROOT = Path(__file__).resolve().parents[3]
SLOW_START = "import time\nclass TritonPythonModel:\n    def initialize(self, args):\n        time.sleep(600)\n"


def until(condition: Callable[[], Any]) -> Any:
    """The first true answer of ``condition``."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (answer := condition()):
        assert time.monotonic() < deadline, "this never happened"
        time.sleep(0.01)
    return answer


def processes_of(folder: Path) -> list[str]:
    """The living processes that have something to do with a folder, other than this one."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or ())
        if str(folder) in line and process.pid != os.getpid() and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(f"{process.pid} {line}")
    return found


def segments(prefix: str = "unet-triton-") -> set[str]:
    """The shared-memory segments whose name begins like this."""
    return {path.name for path in Path("/dev/shm").glob(f"{prefix}*")}


def segments_in_use() -> set[str]:
    """The segments that a living process has mapped."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used |= set(re.findall(r"/dev/shm/(unet-triton-\S+)", maps.read_text(errors="replace")))
    return used


@pytest.fixture
def repository(tiny_artefacts: Path, tmp_path: Path) -> Path:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings())
    return tmp_path / "models"


@pytest.fixture
def nothing_left_behind(tmp_path: Path) -> Iterator[None]:
    """No test's server leaves a process, a shared-memory segment or a state file."""
    before = segments()
    yield
    until(lambda: not processes_of(tmp_path))
    # Another test session's server may run beside ours.
    until(lambda: not segments() - before - segments_in_use())
    assert not (tmp_path / "state" / "server.json").exists()


@pytest.fixture
def command(repository: Path, settings_for: MakeSettings) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``serve/triton.py`` as a user does, always on the same free ports."""
    settings = settings_for(repository)
    started: list[subprocess.Popen[str]] = []

    def launch(action: str, *more: str) -> subprocess.Popen[str]:
        line = [sys.executable, "serve/triton.py", action, "--model_repository", str(repository)]
        for name, port in settings.ports.items():
            line += [f"--{name}", str(port)]
        started.append(
            subprocess.Popen(
                [*line, "--state_dir", str(settings.state_dir), *more],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                start_new_session=True,
            )
        )
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a command says; it must end with ``code``."""
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == code, out + err
    return out + err


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def state_of(folder: Path) -> ServerState:
    """The state of the server that is being started."""
    state: ServerState = until(lambda: load_state(folder / "state"))
    return state


def start_up_slowly(repository: Path) -> None:
    (repository / "unet" / "1" / "model.py").write_text(SLOW_START)


def stub_of(state: ServerState) -> psutil.Process:
    """The python backend's process, once the model is being loaded."""
    stub: psutil.Process = until(lambda: next(iter(psutil.Process(state.server_pid).children()), None))
    return stub


def infer(url: str, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from tritonclient import grpc

    tensor = grpc.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    with grpc.InferenceServerClient(url) as client:
        answer = client.infer("unet", [tensor]).as_numpy("probability")
    assert isinstance(answer, np.ndarray)
    return answer


def in_namespace(mounts: str, line: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command where some mounts are others than here, which needs no rights where namespaces are allowed."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no namespaces of mounts (unshare -rm)")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mounts} && exec "$@"', "sh", *line],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=TIMEOUT_S,
        check=False,
    )
