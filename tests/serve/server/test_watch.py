from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.control import control_of
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from serve.server.state import answers_ready
from serve.server.watch import Watcher, WatchSettings
from serve.triton import main
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
        assert watcher.stdout.readline().startswith("unet was loaded anew in ")
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
    assert answers_ready(settings.http_address, settings.http_port, ["unet"])
    # It never saw the process alive.
    watcher = Watcher(settings.state_dir, WatchSettings(timeout_s=1, failures=2))
    watcher.look()
    assert "canary 1 of 2 of unet failed: " in capsys.readouterr().out
    watcher.look()
    said = capsys.readouterr().out
    assert "canary 2 of 2 of unet failed: " in said
    assert "unet was loaded anew in " in said
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


def test_a_full_queue_is_no_reason_to_load_anew(tiny_artefacts: Path, tmp_path: Path) -> None:
    published = publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_queue_size=1, max_batch_size=1))
    gate = tmp_path / "gate"
    slow = (
        "\nimport os\nimport time\n"
        "class TritonPythonModel(TritonPythonModel):\n"
        "    def execute(self, requests):\n"
        f"        while os.path.exists({str(gate)!r}):\n"
        "            time.sleep(0.01)\n"
        "        return super().execute(requests)\n"
    )
    with (published.path / "model.py").open("a") as stream:
        stream.write(slow)
    http, grpc, metrics = free_ports(3)
    settings = ServerSettings(
        tmp_path / "models", tmp_path / "log", tmp_path / "state", http, grpc, metrics, model_control="explicit"
    )
    with TritonServer(settings):
        control = control_of(settings.state_dir)
        gate.touch()
        answered = threading.Event()

        def ask() -> None:
            control.canary("unet", CANARY_TIMEOUT_S)
            answered.set()

        # Two under way, one in the queue, and what the batcher holds: some of these find the queue full.
        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        assert answered.wait(CANARY_TIMEOUT_S)
        gate.unlink()
        for client in clients:
            client.join()


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
