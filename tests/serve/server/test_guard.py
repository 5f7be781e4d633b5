"""A server that crashes is started again by its guard, a bounded number of times, and never with other models."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from serve.models.config import ModelSettings, RepositoryError
from serve.models.publish import publish
from serve.segment.segmenter import Segmenter
from serve.server.control import control_of
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings, WatchSettings
from serve.server.state import ServerState, load_state, note_model
from serve.server.watch import Watcher
from serve.triton import main
from tests.serve.server.conftest import MakeSettings, finish, first_line, infer, segments, until

pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def noise(count: int, side: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, side, side), np.uint8)


def crash(state_dir: Path, number: int = signal.SIGSEGV) -> ServerState:
    """Crash the server; its state from before."""
    state = load_state(state_dir)
    assert state is not None
    os.kill(state.server_pid, number)
    return state


def ready_again(state_dir: Path, restarted: int) -> ServerState:
    """The state of the server once it was started again so many times, and is ready."""

    def ready() -> ServerState | None:
        state = load_state(state_dir)
        return state if state is not None and state.restarted == restarted and state.is_ready else None

    found: ServerState = until(ready)
    return found


@pytest.mark.parametrize("action", ["run", "start"])
def test_a_server_that_crashes_is_started_again_and_says_so(
    action: str, command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command(action)
    assert first_line(process).startswith("ready: ")
    before = crash(tmp_path / "state")
    after = ready_again(tmp_path / "state", 1)
    assert (after.guard_pid, after.server_id, after.grpc_port) == (before.guard_pid, before.server_id, before.grpc_port)
    assert not psutil.pid_exists(before.server_pid)
    image = noise(1, 204)
    answer = infer(after.grpc_url, image)
    np.testing.assert_allclose(answer, image[:, :, 92:-92, 92:-92] / 255, atol=1e-3)
    assert "it crashed, and was started again, 1 times" in finish(command("status"))
    log = (tmp_path / "state" / "triton.log").read_text()
    assert "tritonserver ended by signal 11\n" in log
    assert finish(command("stop")) == "stopped\n"
    assert not segments(after.shm_prefix)


@pytest.mark.parametrize("shared_memory", ["on", "off"])
def test_a_client_at_work_waits_for_the_new_start_and_has_every_slice_right(
    shared_memory: str, repository: Path, settings_for: MakeSettings
) -> None:
    images = np.random.default_rng(1).integers(0, 256, (40, 60, 60), np.uint8)
    settings = settings_for(repository)

    def crash_meanwhile() -> Iterator[np.ndarray[Any, Any]]:
        yield from images[:20]
        crash(
            settings.state_dir, signal.SIGKILL
        )  # a segmentation fault writes its backtrace first, and answers meanwhile
        yield from images[20:]

    with (
        TritonServer(settings) as server,
        Segmenter(server.settings.grpc_url, shared_memory=shared_memory, in_flight=2, patience_s=60) as segmenter,
    ):
        found = list(segmenter.segment(crash_meanwhile()))
        state = load_state(settings.state_dir)
        assert state is not None
        assert state.restarted == 1
    expected = (images.astype(np.float16) * np.float16(1 / 255)).astype(np.float32)
    np.testing.assert_array_equal(np.stack(found), expected)


def test_a_server_that_goes_on_crashing_is_left_ended_and_said(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command("run", "--restarts", "1")
    first_line(process)
    crash(tmp_path / "state", signal.SIGKILL)
    ready_again(tmp_path / "state", 1)
    crash(tmp_path / "state")
    said = finish(process, 2)
    assert "error: Triton ended by itself; the end of " in said
    assert "it is not started again: 2 crashes or failed starts within an hour" in said


def test_a_server_that_was_ended_in_order_by_another_is_not_started_again(
    command: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = command("run")
    first_line(process)
    crash(tmp_path / "state", signal.SIGTERM)
    assert "tritonserver ended with exit code 0\n" in finish(process, 2)


def test_what_the_start_would_refuse_is_not_started_again_either(
    repository: Path, settings_for: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", "--model_repository", str(repository)]) == 0
    assert capsys.readouterr().out == f"{repository} can be served: unet\n"
    settings = settings_for(repository, restarts=2)
    with TritonServer(settings) as server:
        (repository / "unet" / "1" / "card.json").write_text("{}")
        crash(settings.state_dir)
        with pytest.raises(TritonError, match="Triton ended by itself"):
            server.wait()
        log = settings.log.read_text()
    assert "the check before a new start ended with exit code 2\n" in log
    assert "it is not started again: 3 crashes or failed starts within an hour\n" in log
    assert log.count("tritonserver is started again") == 0
    assert main(["check", "--model_repository", str(repository)]) == 2
    said = capsys.readouterr().err
    assert said in log


def test_a_stop_while_it_waits_to_start_again_stops_it(repository: Path, settings_for: MakeSettings) -> None:
    settings = settings_for(repository)
    server = TritonServer(settings)
    with server:
        crash(settings.state_dir)
        ready_again(settings.state_dir, 1)
        crash(settings.state_dir)  # the second new start comes after a pause
        until(lambda: settings.log.read_text().count("tritonserver ended by signal 11") == 2)
    assert "tritonserver is started again" in settings.log.read_text()
    assert settings.log.read_text().count("tritonserver is started again") == 1


def published_and_loaded(artefacts: Path, settings: ServerSettings) -> ServerState | None:
    """The server's state when it has loaded another model.

    Triton's python backend has crashed the server as it loaded a second model (``boost::interprocess::lock_exception``,
    once, on a busy machine); the guard then starts it again, and the version that was taken back is published again.
    """
    state = load_state(settings.state_dir)
    if state is None or not state.is_ready:
        return None
    with contextlib.suppress(RepositoryError):
        publish(artefacts, settings.repository, ModelSettings("later"), load=control_of(settings.state_dir).load)
        return load_state(settings.state_dir)
    return None


def test_a_model_that_was_loaded_meanwhile_is_watched_and_loaded_again(
    tiny_artefacts: Path, repository: Path, settings_for: MakeSettings
) -> None:
    settings = settings_for(repository, model_control="explicit", stop_timeout_s=2)
    with TritonServer(settings) as server:
        watcher = Watcher(settings.state_dir, WatchSettings())
        state = until(lambda: published_and_loaded(tiny_artefacts, settings))
        assert state.models == ["unet", "later"]
        watcher.look()
        assert set(watcher._workers.values()) == {"unet", "later"}
        crash(settings.state_dir)
        ready_again(settings.state_dir, state.restarted + 1)
        for model in ("unet", "later"):
            control_of(settings.state_dir).canary(model, 30)
        watcher.look()
        assert {psutil.Process(pid).ppid() for pid in watcher._workers} == {server.pid}


def test_a_server_of_an_older_release_takes_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state does not say which folder it is in."""
    monkeypatch.chdir(tmp_path)
    known = {field.name: "" for field in dataclasses.fields(ServerState)}
    note_model(ServerState(**known), "later")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_no_start_is_tried_without_end(tmp_path: Path) -> None:
    with pytest.raises(TritonError, match="restarts is -1; it must be 0 or more"):
        ServerSettings(tmp_path, tmp_path, tmp_path, restarts=-1)
