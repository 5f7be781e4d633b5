"""No two servers take each other's port, state folder or answers."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.models.versions import versions_in
from serve.repository import main as publish_command
from serve.server.claims import Claims
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from serve.server.state import load_state
from serve.triton import main as triton_command
from tests.serve.server.conftest import ROOT, finish, infer, state_of
from unet.processes import free_ports

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
Command = Callable[..., "subprocess.Popen[str]"]


def both(first: subprocess.Popen[str], second: subprocess.Popen[str]) -> tuple[str, str]:
    """What the one command that succeeded said, and what the other did, which must be one sentence."""
    ends = [(process.communicate(timeout=60), process.returncode) for process in (first, second)]
    (winner, won), (loser, lost) = sorted(ends, key=lambda end: end[1])
    assert (won, lost) == (0, 2), ends
    assert winner[0].startswith("ready: "), ends
    assert loser[0] == "", ends
    assert loser[1].startswith("error: "), ends
    assert loser[1].count("\n") == 1, ends
    return winner[0], loser[1]


def test_of_two_starts_on_one_port_one_says_why_it_is_none(command: Command, tmp_path: Path) -> None:
    folders = [tmp_path / "state", tmp_path / "other"]
    _, refused = both(*(command("start", "--state_dir", str(folder)) for folder in folders))
    assert "port" in refused
    assert "choose another" in refused
    kept = [folder for folder in folders if load_state(folder) is not None]
    assert len(kept) == 1
    assert finish(command("status", "--state_dir", str(kept[0]))).startswith("ready: ")
    assert finish(command("stop", "--state_dir", str(kept[0]))) == "stopped\n"


def test_of_two_starts_with_one_state_folder_one_says_why_it_is_none(command: Command, tmp_path: Path) -> None:
    _, refused = both(command("start"), command("start"))
    assert f"with the state folder {tmp_path / 'state'}: stop it with `make stop`" in refused
    # The loser has left the winner's state alone.
    assert finish(command("status")).startswith(f"ready: process {state_of(tmp_path).server_pid} ")
    assert finish(command("stop")) == "stopped\n"


def test_a_server_that_is_only_being_started_is_not_said_to_be_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claims = Claims()
    assert claims.take_state(tmp_path)
    assert not Claims().take_state(tmp_path)
    assert triton_command(["stop", "--state_dir", str(tmp_path)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: a server is being started or stopped with {tmp_path}: run this again in a moment\n"
    )
    claims.release()
    assert triton_command(["stop", "--state_dir", str(tmp_path)]) == 0


def test_the_answers_of_another_server_do_not_count(triton_server: TritonServer) -> None:
    state = load_state(triton_server.settings.state_dir)
    assert state is not None
    assert state.is_ready
    assert not dataclasses.replace(state, server_id="unet-triton-0").is_ready


def test_a_version_is_not_loaded_into_another_server(
    triton_server: TritonServer, tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server of the state folder lives, and on the port that it is said to have another one answers."""
    models = tmp_path / "models"
    publish(tiny_artefacts, models, ModelSettings())
    http, grpc, metrics = free_ports(3)
    mine = ServerSettings(models, tmp_path / "log", tmp_path / "state", http, grpc, metrics, model_control="explicit")
    with TritonServer(mine):
        path = tmp_path / "state" / "server.json"
        written = path.read_text()
        path.write_text(json.dumps({**json.loads(written), "http_port": triton_server.settings.http_port}))
        arguments = ["--artefacts", str(tiny_artefacts), "--model_repository", str(models)]
        assert publish_command([*arguments, "--load", "--state_dir", str(tmp_path / "state")]) == 2
        assert "another server answers at 127.0.0.1:" in capsys.readouterr().err
        assert versions_in(models / "unet") == [1]
        path.write_text(written)
        assert publish_command([*arguments, "--load", "--state_dir", str(tmp_path / "state")]) == 0


@pytest.mark.parametrize(
    ("address", "http_address", "reached_at"),
    [
        ("localhost", "localhost", ["127.0.0.1"]),
        ("::1", "[::1]", ["[::1]"]),
        ("::", "127.0.0.1", ["[::1]", "127.0.0.1"]),
    ],
)
def test_names_and_both_kinds_of_addresses_are_listened_on(
    address: str, http_address: str, reached_at: list[str], command: Command, tmp_path: Path
) -> None:
    assert finish(command("start", "--address", address, "--http_address", http_address)).startswith("ready: gRPC ")
    state = state_of(tmp_path)
    image = np.full((1, 1, 204, 204), 255, np.uint8)
    for host in reached_at:
        np.testing.assert_allclose(infer(f"{host}:{state.grpc_port}", image), np.ones((1, 1, 20, 20)), atol=1e-3)
    assert finish(command("status")).startswith("ready: ")
    assert finish(command("stop")) == "stopped\n"


def test_a_client_of_this_machine_is_served_by_a_server_that_is_open_to_the_network(
    command: Command, tmp_path: Path
) -> None:
    """It shares no memory with anyone, so that the client sends its pixels."""
    finish(command("start", "--address", "0.0.0.0"))
    state = state_of(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (2, 80, 90), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", images, photometric="minisblack")
    line = [sys.executable, "serve/client.py", str(tmp_path / "stack.tif"), "--url", f"127.0.0.1:{state.grpc_port}"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    probability = tifffile.imread(tmp_path / "stack-probability.tif")
    np.testing.assert_allclose(probability, images / 255, atol=1e-3)
    assert finish(command("stop")) == "stopped\n"


@pytest.mark.parametrize("name", ["no-such-host.invalid", "a b", ""])
def test_an_address_that_is_none_is_named(name: str, repository: Path, tmp_path: Path) -> None:
    settings = ServerSettings(repository, tmp_path / "log", tmp_path / "state", address=name)
    with pytest.raises(TritonError, match="give an address of this machine"):
        TritonServer(settings).start()
