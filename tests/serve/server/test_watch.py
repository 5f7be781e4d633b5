from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.control import control_of
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings, WatchSettings
from serve.server.state import load_state
from serve.server.watch import Watcher
from serve.triton import main, status
from unet.processes import free_ports

CANARY_TIMEOUT_S = 60.0


@pytest.fixture
def explicit(tiny_artefacts: Path, tmp_path: Path) -> Iterator[TritonServer]:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings())
    http, grpc, metrics = free_ports(3)
    settings = ServerSettings(
        tmp_path / "models",
        tmp_path / "log",
        tmp_path / "state",
        http,
        grpc,
        metrics,
        model_control="explicit",
        # A request that a dead model has swallowed would be waited for.
        stop_timeout_s=1,
    )
    with TritonServer(settings) as server:
        yield server


def kill_stub(server: TritonServer) -> psutil.Process:
    """End the process that the python backend runs the model in."""
    stub = psutil.Process(server.pid).children()[0]
    stub.kill()
    # Triton leaves it a zombie. A signal to its own child would be waited for; this is another's.
    while stub.is_running() and stub.status() != psutil.STATUS_ZOMBIE:
        os.sched_yield()
    return stub


def living_children(server: TritonServer) -> list[psutil.Process]:
    children = psutil.Process(server.pid).children()
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE]


def test_a_model_whose_process_died_says_ready_and_is_loaded_anew(explicit: TritonServer) -> None:
    settings = explicit.settings
    control = control_of(settings.state_dir)
    # What the watcher says is read line by line, to know what it is at.
    line = [sys.executable, "-u", "serve/triton.py", "watch", "--state_dir", str(settings.state_dir)]
    watcher = subprocess.Popen(
        [*line, "--watch_interval_s", "0.1", "--watch_timeout_s", "5"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert watcher.stdout is not None
    try:
        assert watcher.stdout.readline().startswith("watching unet")
        killed = kill_stub(explicit)
        # A canary may have been on its way when the process died.
        while (said := watcher.stdout.readline()).startswith("canary"):
            pass
        assert said == "a process of unet has died\n"
        assert watcher.stdout.readline().startswith("unet was loaded again in ")
        control.canary("unet", CANARY_TIMEOUT_S)
        assert killed.pid not in {child.pid for child in living_children(explicit)}
        # It ends with the server.
        explicit.stop()
        assert watcher.wait(CANARY_TIMEOUT_S) == 0
    finally:
        watcher.kill()
        watcher.communicate()


def test_a_model_that_gives_no_answer_is_loaded_anew(
    explicit: TritonServer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = explicit.settings
    kill_stub(explicit)
    # This is why a canary is needed.
    state = load_state(settings.state_dir)
    assert state is not None
    assert state.is_ready
    assert status(settings.state_dir, timeout_s=1) == 1
    assert capsys.readouterr().out.startswith(f"not answering: process {state.server_pid} serves unet, ")
    # It never saw the process alive.
    watcher = Watcher(settings.state_dir, WatchSettings(timeout_s=1, failures=2))
    # A process that went between the listing and the look at it is no fault.
    with subprocess.Popen([sys.executable, "-c", ""]) as brief:
        gone = psutil.Process(brief.pid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watcher, "_children", lambda: [gone])
        assert watcher._bereaved() == []
        assert watcher._living() == {}
    watcher.look()
    assert "canary 1 of 2 of unet failed: " in capsys.readouterr().out
    watcher.look()
    said = capsys.readouterr().out
    assert "canary 2 of 2 of unet failed: " in said
    assert "unet was loaded again in " in said
    control_of(settings.state_dir).canary("unet", CANARY_TIMEOUT_S)


def test_a_server_in_the_foreground_is_watched_until_it_is_stopped(tiny_artefacts: Path, tmp_path: Path) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings())
    ports = zip(("--http_port", "--grpc_port", "--metrics_port"), map(str, free_ports(3)))
    line = [sys.executable, "serve/triton.py", "run", "--model_control", "explicit", "--watch"]
    line += ["--model_repository", str(tmp_path / "models"), "--state_dir", str(tmp_path / "state")]
    line += [word for pair in ports for word in pair]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[3])
    assert server.stdout is not None
    try:
        assert server.stdout.readline().startswith("ready: ")
        assert server.stdout.readline() == "watching unet\n"
        assert main(["stop", "--state_dir", str(tmp_path / "state")]) == 0
        assert server.stdout.readlines()[-1] == "stopped\n"
        assert server.wait(CANARY_TIMEOUT_S) == 0
    finally:
        server.terminate()
        server.communicate()


@pytest.fixture(params=[0, 4])
def gated(request: pytest.FixtureRequest, tiny_artefacts: Path, tmp_path: Path) -> Iterator[tuple[TritonServer, Path]]:
    """A server whose passes take 0.3 s and as long as a file, the gate, exists; without and with a queue limit."""
    settings = ModelSettings(max_queue_size=request.param, max_batch_size=1)
    published = publish(tiny_artefacts, tmp_path / "models", settings)
    gate = tmp_path / "gate"
    slow = (
        "\nimport os\nimport time\n"
        "class TritonPythonModel(TritonPythonModel):\n"
        "    def execute(self, requests):\n"
        "        time.sleep(0.3)\n"
        f"        while os.path.exists({str(gate)!r}):\n"
        "            time.sleep(0.01)\n"
        "        return super().execute(requests)\n"
    )
    with (published.path / "model.py").open("a") as stream:
        stream.write(slow)
    http, grpc, metrics = free_ports(3)
    served = ServerSettings(
        *(tmp_path / "models", tmp_path / "log", tmp_path / "state", http, grpc, metrics),
        model_control="explicit",
        stop_timeout_s=5,
    )
    with TritonServer(served) as server:
        yield server, gate


@contextlib.contextmanager
def crowd(server: TritonServer, count: int) -> Iterator[None]:
    """Clients that send tile after tile, refused or not."""
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    enough = threading.Event()

    def ask() -> None:
        tensor = grpc.InferInput("image", [1, 1, 204, 204], "UINT8")
        tensor.set_data_from_numpy(np.zeros((1, 1, 204, 204), np.uint8))
        with grpc.InferenceServerClient(server.settings.grpc_url) as client:
            while not enough.is_set():
                with contextlib.suppress(InferenceServerException):
                    client.infer("unet", [tensor], client_timeout=CANARY_TIMEOUT_S)

    clients = [threading.Thread(target=ask) for _ in range(count)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        enough.set()
        for client in clients:
            client.join()


def canaries(server: TritonServer, count: int) -> None:
    """One after the other: requests that had begun before a model hung are still answered, and count."""
    for _ in range(count):
        control_of(server.settings.state_dir).canary("unet", 1)


def test_a_busy_model_is_not_loaded_again_and_one_that_hangs_is_noticed(
    gated: tuple[TritonServer, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    server, gate = gated
    watcher = Watcher(server.settings.state_dir, WatchSettings(timeout_s=1, failures=1))
    with crowd(server, 8):
        # Eight wait for the one or two that are under way: a canary gets no turn in a second, or finds the queue full.
        for _ in range(2):
            watcher.look()
        assert capsys.readouterr().out == ""
        assert main(["status", "--state_dir", str(server.settings.state_dir)]) == 0
        assert capsys.readouterr().out.startswith("ready: ")
        gate.touch()
        try:
            with pytest.raises(TritonError, match="answered neither the canary of unet nor any other request"):
                canaries(server, 10)
        finally:
            gate.unlink()


def test_watching_needs_a_server_with_model_control(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", "--state_dir", str(tmp_path)]) == 2
    assert "no server is running" in capsys.readouterr().err
    assert main(["watch", "--state_dir", str(triton_server.settings.state_dir)]) == 2
    assert "start it with --model_control explicit" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["run", "--watch"])


@pytest.mark.parametrize(("name", "value"), [("interval_s", 0), ("timeout_s", float("inf")), ("failures", 0)])
def test_settings_check_themselves(name: str, value: float) -> None:
    with pytest.raises(TritonError, match=f"{name} is "):
        WatchSettings(**{name: value})  # type: ignore[arg-type]
