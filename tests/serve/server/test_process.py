from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from serve.server.command_line import Identity, server_command
from serve.server.install import TritonError, find_installation
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from serve.triton import main
from tests.serve.server.conftest import (
    MakeSettings,
    finish,
    first_line,
    infer,
    processes_of,
    segments,
    start_up_slowly,
    state_of,
    stub_of,
    until,
)

pytestmark = pytest.mark.usefixtures("nothing_left_behind")

SLOW_END = """
import time
class TritonPythonModel(TritonPythonModel):
    def finalize(self):
        time.sleep(600)
"""


def noise(count: int, size: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, size, size), np.uint8)


def expected(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return image[:, :, 92:-92, 92:-92] / 255


def test_the_model_answers(triton_server: TritonServer) -> None:
    image = noise(3, 220)
    probability = infer(triton_server.settings.grpc_url, image)
    assert probability.dtype == np.float16
    np.testing.assert_allclose(probability, expected(image), atol=1e-3)


def test_requests_of_any_size_at_the_same_time_get_their_own_answers(triton_server: TritonServer) -> None:
    images = [noise(1 + index % 3, (204, 252)[index % 2], index) for index in range(24)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda image: infer(triton_server.settings.grpc_url, image), images))
    for image, answer in zip(images, answers):
        np.testing.assert_allclose(answer, expected(image), atol=1e-3)


@pytest.mark.parametrize(("count", "size", "words"), [(1, 512, "512"), (9, 204, "batch-size must be <= 8")])
def test_a_request_that_cannot_be_served_is_told_why(
    triton_server: TritonServer, count: int, size: int, words: str
) -> None:
    from tritonclient.utils import InferenceServerException

    with pytest.raises(InferenceServerException, match=words) as caught:
        infer(triton_server.settings.grpc_url, noise(count, size))
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    test_the_model_answers(triton_server)


def test_the_server_is_closed_to_the_network_and_to_model_control(triton_server: TritonServer) -> None:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    listening = [c for c in psutil.Process(triton_server.pid).net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.port for c in listening} == set(triton_server.settings.ports.values())
    assert {c.laddr.ip.replace("::ffff:", "") for c in listening} == {"127.0.0.1"}
    with grpc.InferenceServerClient(triton_server.settings.grpc_url) as client:
        for change in (client.load_model, client.unload_model):
            with pytest.raises(InferenceServerException, match="This protocol is restricted"):
                change("unet")


def test_start_status_stop(command: Callable[..., subprocess.Popen[str]], repository: Path) -> None:
    assert finish(command("status"), 1) == "no server is running\n"
    assert finish(command("start")).startswith("ready: gRPC 127.0.0.1:")
    state = state_of(repository.parent)
    image = noise(1, 204)
    np.testing.assert_allclose(infer(f"127.0.0.1:{state.grpc_port}", image), expected(image), atol=1e-3)
    assert f"ready: process {state.server_pid} serves unet" in finish(command("status"))
    assert f"a server runs already (process {state.server_pid}" in finish(command("start"), 2)
    # As if an older release of the project had started it, which knew no signatures.
    file = repository.parent / "state" / "server.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values.pop("public_key") == ""
    file.write_text(json.dumps(values), encoding="utf-8")
    assert finish(command("stop")) == "stopped\n"
    assert finish(command("stop")) == "no server is running\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_serving_stops_everything(
    number: int, command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command("run")
    assert first_line(process).startswith("ready: ")
    state = state_of(tmp_path)
    assert segments(state.shm_prefix)
    process.send_signal(number)
    assert finish(process) == "stopped\n"
    # When the command has ended everything has ended, not some time later.
    assert not processes_of(tmp_path)
    assert not segments(state.shm_prefix)


def test_ctrl_c_while_starting_stops_everything(
    command: Callable[..., subprocess.Popen[str]], repository: Path, tmp_path: Path
) -> None:
    start_up_slowly(repository)
    for action, code in (("run", 0), ("start", 130)):
        process = command(action)
        stub_of(state_of(tmp_path))
        process.send_signal(signal.SIGINT)
        finish(process, code)
        assert not processes_of(tmp_path)


@pytest.mark.parametrize("slowly", [False, True])
def test_the_server_goes_when_its_supervisor_is_killed(
    slowly: bool, command: Callable[..., subprocess.Popen[str]], repository: Path, tmp_path: Path
) -> None:
    if slowly:
        start_up_slowly(repository)
    process = command("run")
    if slowly:
        stub_of(state_of(tmp_path))
    else:
        first_line(process)
    process.kill()
    until(lambda: not (tmp_path / "state" / "server.json").exists())


def test_the_server_goes_when_its_guard_is_killed(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    finish(command("start"))
    state = state_of(tmp_path)
    os.kill(state.guard_pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(state.server_pid) or not processes_of(tmp_path))
    assert finish(command("status"), 1) == "no server is running\n"
    assert finish(command("stop")) == "no server is running\n"


def test_another_server_starts_after_a_guard_was_killed_while_starting(
    command: Callable[..., subprocess.Popen[str]], repository: Path, tmp_path: Path
) -> None:
    good = (repository / "unet" / "1" / "model.py").read_text()
    start_up_slowly(repository)
    command("run")
    state = state_of(tmp_path)
    until(lambda: segments(state.shm_prefix))
    os.kill(state.guard_pid, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(state.server_pid) or not processes_of(repository))
    (repository / "unet" / "1" / "model.py").write_text(good)
    finish(command("start"))
    finish(command("stop"))


def test_a_server_that_ends_by_itself_is_reported(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command("run", "--restarts", "0")
    first_line(process)
    os.kill(state_of(tmp_path).server_pid, signal.SIGKILL)
    said = finish(process, 2)
    assert "error: Triton ended by itself; the end of " in said
    assert "tritonserver ended by signal 9" in said


def test_a_server_that_does_not_end_is_killed_even_when_ctrl_c_comes_twice(
    command: Callable[..., subprocess.Popen[str]], repository: Path, tmp_path: Path
) -> None:
    with (repository / "unet" / "1" / "model.py").open("a") as stream:
        stream.write(SLOW_END)
    process = command("run", "--stop_timeout_s", "2")
    first_line(process)
    process.send_signal(signal.SIGINT)
    log = tmp_path / "state" / "triton.log"
    until(lambda: "Waiting for in-flight requests" in log.read_text())
    process.send_signal(signal.SIGINT)
    finish(process)
    assert not processes_of(tmp_path)
    assert "tritonserver did not stop within 2 s and is killed" in log.read_text()


def test_a_start_up_that_hangs_is_bounded_and_reported(repository: Path, settings_for: MakeSettings) -> None:
    start_up_slowly(repository)
    started = time.monotonic()
    with pytest.raises(TritonError, match=r"not ready after 3 s and was stopped; the end of (?s:.*)loading: unet:1"):
        TritonServer(settings_for(repository, start_timeout_s=3)).start()
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("name", ["http_port", "grpc_port", "metrics_port"])
def test_a_port_in_use_is_named(name: str, repository: Path, settings_for: MakeSettings) -> None:
    settings = settings_for(repository)
    with socket.socket() as other:
        other.bind(("127.0.0.1", settings.ports[name]))
        other.listen()
        with pytest.raises(TritonError, match=f"port {settings.ports[name]} .*another with --{name}"):
            TritonServer(settings).start()


def test_open_to_the_network_http_and_shared_memory_stay_on_this_machine(tmp_path: Path) -> None:
    settings = ServerSettings(tmp_path, tmp_path, tmp_path, address="0.0.0.0")
    installation = find_installation(tmp_path)
    identity = Identity("id", "prefix", tmp_path, installation.backends)
    flags = dict(flag.partition("=")[::2] for flag in server_command(settings, installation, identity, [], "KEY"))
    assert (flags["--http-address"], flags["--grpc-address"]) == ("127.0.0.1", "0.0.0.0")
    assert flags["--grpc-restricted-protocol"] == "model-repository,trace,logging,shared-memory:admin-key=KEY"
    both = ServerSettings(tmp_path, tmp_path, tmp_path, address="0.0.0.0", http_address="0.0.0.0")
    flags = dict(flag.partition("=")[::2] for flag in server_command(both, installation, identity, [], "KEY"))
    assert flags["--http-restricted-api"] == "model-repository,trace,logging,shared-memory:admin-key=KEY"


def test_stop_without_a_server_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stop", "--state_dir", str(tmp_path / "state")]) == 0
    assert capsys.readouterr().out == "no server is running\n"


def test_a_process_that_took_over_the_number_is_left_alone(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    finish(command("start"))
    file = tmp_path / "state" / "server.json"
    state = state_of(tmp_path)
    written = file.read_text()
    file.write_text(written.replace(str(state.guard_start), "1").replace(str(state.server_start), "1"))
    assert finish(command("stop")) == "no server is running\n"
    assert psutil.pid_exists(state.guard_pid)
    assert psutil.pid_exists(state.server_pid)
    file.write_text(written)
    assert finish(command("stop")) == "stopped\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"http_port": 0}, "http_port is 0"),
        ({"grpc_port": 8000}, "must differ"),
        ({"metrics_port": 65536}, "metrics_port is 65536"),
        ({"start_timeout_s": 0}, "start_timeout_s is 0"),
        ({"stop_timeout_s": float("nan")}, "stop_timeout_s is nan"),
    ],
)
def test_settings_check_themselves(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TritonError, match=words):
        ServerSettings(Path("models"), Path("log"), Path("state"), **changes)
