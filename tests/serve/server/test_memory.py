"""A tile that the memory has no room for is refused, and the server lives on."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.connection import Connection
from serve.segment.slot import SharedSlot
from serve.server.process import TritonServer
from tests.serve.conftest import TILE_SIZES, enter_engine
from tests.serve.server.conftest import ROOT, MakeSettings, finish, infer, state_of, until
from unet.card import Card

pytestmark = pytest.mark.usefixtures("nothing_left_behind")
Command = Callable[..., "subprocess.Popen[str]"]
CGROUP = Path("/sys/fs/cgroup")
LIMIT_BYTES = 1 << 30


def hungry_artefacts(folder: Path) -> Path:
    """A network that holds 64 float32 planes of the image at a time; its answer is the middle of the image."""
    folder.mkdir()
    constants = {
        "weights": np.full((64, 1, 1, 1), 1 / 255, np.float32),
        "starts": np.array([92, 92], np.int64),
        "ends": np.array([-92, -92], np.int64),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["single"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["single", "weights"], ["planes"]),
        helper.make_node("ReduceMean", ["planes"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Slice", ["mean", "starts", "ends", "axes"], ["middle"]),
        helper.make_node("Cast", ["middle"], ["probability"], to=TensorProto.FLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "hungry",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT16, ["N", 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(folder / "model.fp16.onnx"))
    card = Card(folder)
    card.tile_sizes = TILE_SIZES
    enter_engine(card)
    card.save()
    return folder


def limited_group(parent: Path) -> Path | None:
    """A new control group with a gigabyte of memory below another one, if it may be made."""
    folder = parent / f"unet-test-{os.getpid()}"
    with contextlib.suppress(OSError):
        folder.mkdir()
        for limit in ("memory.max", "memory.limit_in_bytes"):
            if (folder / limit).exists():
                (folder / limit).write_text(str(LIMIT_BYTES))
                return folder
    with contextlib.suppress(OSError):
        folder.rmdir()
    return None


@pytest.fixture
def small_container() -> Iterator[Path]:
    parents = [CGROUP, CGROUP / "memory"]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            parents.insert(0, CGROUP / controllers / path.lstrip("/"))
    group = next((found for parent in parents if (found := limited_group(parent)) is not None), None)
    if group is None:
        pytest.skip("no control group can be made here")
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_tile_that_the_memory_has_no_room_for_is_refused(
    small_container: Path, settings_for: MakeSettings, tmp_path: Path
) -> None:
    from tritonclient.utils import InferenceServerException

    publish(hungry_artefacts(tmp_path / "artefacts"), tmp_path / "models", ModelSettings())
    settings = settings_for(tmp_path / "models")
    line = ["sh", "-c", f'echo $$ > {small_container}/cgroup.procs && exec "$@"', "sh", sys.executable]
    line += ["serve/triton.py", "run", "--model_repository", str(tmp_path / "models")]
    line += [word for name, port in settings.ports.items() for word in (f"--{name}", str(port))]
    line += ["--state_dir", str(settings.state_dir)]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stdout is not None
    try:
        assert server.stdout.readline().startswith("ready: ")
        with pytest.raises(InferenceServerException, match=r"2204 x 2204 pixels takes \d+ MiB, and this server has"):
            infer(settings.grpc_url, np.zeros((1, 1, 2204, 2204), np.uint8))
        white = np.full((1, 1, 204, 204), 255, np.uint8)
        np.testing.assert_allclose(infer(settings.grpc_url, white), np.ones((1, 1, 20, 20)), atol=1e-3)
    finally:
        server.terminate()
        server.communicate()


def test_no_tile_is_larger_than_the_configuration_says(
    tiny_artefacts: Path, settings_for: MakeSettings, tmp_path: Path
) -> None:
    from tritonclient.utils import InferenceServerException

    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_tile_size=252))
    with TritonServer(settings_for(tmp_path / "models")) as server:
        url = server.settings.grpc_url
        # Three of the largest are as many passes.
        image = np.random.default_rng(0).integers(0, 256, (3, 1, 252, 252), np.uint8)
        np.testing.assert_allclose(infer(url, image), image[:, :, 92:-92, 92:-92] / 255, atol=1e-3)
        with pytest.raises(InferenceServerException, match="at most 252 x 252, the model's max_tile_size") as caught:
            infer(url, np.zeros((1, 1, 268, 268), np.uint8))
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_killed_clients_shared_memory_is_released_and_a_living_ones_stays(command: Command, tmp_path: Path) -> None:
    finish(command("start"))
    state = state_of(tmp_path)
    client = subprocess.Popen(
        [sys.executable, "-c", HOLD_SHARED_MEMORY, state.grpc_url], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert client.stdout is not None
    connection = Connection(state.grpc_url, "unet", "", 10)
    mine = SharedSlot(connection, (1, 1, 204, 204))
    try:
        assert client.stdout.readline() == b"registered\n"
        assert state.regions.of_dead_clients() == {}
        client.kill()
        client.communicate()
        until(lambda: len(connection.client.get_system_shared_memory_status().regions) == 2)
        assert all(f"unet-client-{os.getpid()}-" in name for name in regions_of(connection))
        until(lambda: "bytes that a client left when it was killed" in (tmp_path / "state" / "triton.log").read_text())
    finally:
        mine.close()
        connection.close()
        client.kill()
        finish(command("stop"))


def regions_of(connection: Connection) -> list[str]:
    return list(connection.client.get_system_shared_memory_status().regions)


HOLD_SHARED_MEMORY = """
import sys
import time
from serve.segment.connection import Connection
from serve.segment.slot import SharedSlot

slot = SharedSlot(Connection(sys.argv[1], "unet", "", 10), (1, 1, 204, 204))
print("registered", flush=True)
time.sleep(600)
"""
