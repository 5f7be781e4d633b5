"""The server under load, with a network that takes a while and whose answer is known."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.connection import Connection
from serve.segment.slot import Slot
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.serve.conftest import cropping_model, enter_engine
from unet.card import Card
from unet.processes import free_ports

SIDE = 204
BACKENDS = ("openvino", "python")
# A server that does not answer at all within this has stopped answering.
LIMIT_S = 60.0
_PLANES = 64


def averaging_model(layers: int) -> onnx.ModelProto:
    """A network that makes planes of the image, averages them over and over, and gives the middle of the average.

    Args:
        layers: how often; each takes 0.34 billion operations for a tile of 204 x 204.
    """
    constants = {
        "scale": np.array(1 / 255, np.float32),
        "spread": np.ones((_PLANES, 1, 1, 1), np.float32),
        "average": np.full((_PLANES, _PLANES, 1, 1), 1 / _PLANES, np.float32),
        "starts": np.array([92, 92], np.int64),
        "ends": np.array([-92, -92], np.int64),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["scaled"]),
        helper.make_node("Conv", ["scaled", "spread"], ["planes0"]),
        *(helper.make_node("Conv", [f"planes{n}", "average"], [f"planes{n + 1}"]) for n in range(layers)),
        helper.make_node("ReduceMean", [f"planes{layers}"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Slice", ["mean", "starts", "ends", "axes"], ["middle"]),
        helper.make_node("Cast", ["middle"], ["probability"], to=TensorProto.FLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "averaging",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT16, ["N", 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@contextlib.contextmanager
def loaded_server(layers: int, settings: ModelSettings) -> Iterator[TritonServer]:
    """A running server with that network, or with the quickest one if it has no layers; gone at the block's end."""
    with tempfile.TemporaryDirectory(prefix="unet-load-") as name:
        folder = Path(name)
        onnx.save(averaging_model(layers) if layers else cropping_model(), str(folder / "model.fp16.onnx"))
        card = Card(folder)
        card.tile_sizes = (SIDE,)
        enter_engine(card, "openvino")
        card.save()
        publish(folder, folder / "models", settings)
        http, grpc, metrics = free_ports(3)
        # A crash ends it, so that none goes unnoticed.
        where = ServerSettings(folder / "models", folder / "log", folder / "state", http, grpc, metrics, restarts=0)
        with TritonServer(where) as server:
            yield server


def tiles(count: int) -> npt.NDArray[np.uint8]:
    """So many different tiles, each as a batch of its own: uint8 [count, 1, 1, S, S]."""
    return np.random.default_rng(1).integers(0, 256, (count, 1, 1, SIDE, SIDE), np.uint8)


def is_right(answer: npt.NDArray[Any], tile: npt.NDArray[np.uint8]) -> bool:
    """Whether an answer is the one to this tile; those of two tiles differ by a third on average."""
    return bool(np.allclose(answer, tile[..., 92:-92, 92:-92] / 255, rtol=0, atol=2e-3))


def ask(connection: Connection, slot: Slot, batch: npt.NDArray[np.uint8]) -> bool:
    """Send a batch of tiles and wait; whether the answer is right.

    Raises:
        ServerError: the server refuses, or does not answer.
    """
    count = len(batch)
    slot.images[:count] = batch
    answer = connection.infer(*slot.tensors(connection.grpc, count))
    return is_right(slot.outputs(answer, count), batch)


def memory_mib(server: TritonServer) -> float:
    """Memory of the server and its children that no file backs, in MiB.

    Not all that is resident, nor PSS: both change with what other processes do with the same libraries.
    """
    assert server.pid is not None
    process, total_kib = psutil.Process(server.pid), 0
    for each in (process, *process.children(recursive=True)):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{each.pid}/status").read_text()
            total_kib += sum(int(kib) for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))
    return total_kib / 2**10
