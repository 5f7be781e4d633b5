from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet.card import Card
from unet.card.records import Engine, Proof
from unet.files import sha256_of
from unet.machine import instruction_sets
from unet.processes import free_ports

TILE_SIZES = (204, 252)


def cropping_model() -> onnx.ModelProto:
    """A network with the served interface whose answer is known: the middle of the image, divided by 255."""
    constants = {
        "scale": np.array(1 / 255, np.float16),
        "starts": np.array([92, 92], np.int64),
        "ends": np.array([-92, -92], np.int64),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Slice", ["half", "starts", "ends", "axes"], ["middle"]),
        helper.make_node("Mul", ["middle", "scale"], ["probability"]),
    ]
    graph = helper.make_graph(
        nodes,
        "middle",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT16, ["N", 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="session")
def tiny_artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts with their card, as the exporter writes them, of the network whose answer is known."""
    folder = tmp_path_factory.mktemp("artefacts")
    onnx.save(cropping_model(), str(folder / "model.fp16.onnx"))
    card = Card(folder)
    card.tile_sizes = TILE_SIZES
    enter_engine(card)
    card.model["pixel_size_nm"] = {"train-volume.tif": [50, 4, 4], "of-no-known-size.tif": [None, None, None]}
    card.save()
    return folder


def artefacts_dividing_by(folder: Path, divisor: float) -> Path:
    """Artefacts of a network that gives the middle of the image, divided by ``divisor``."""
    folder.mkdir()
    model = cropping_model()
    scale = next(value for value in model.graph.initializer if value.name == "scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.array(1 / divisor, np.float16), "scale"))
    onnx.save(model, str(folder / "model.fp16.onnx"))
    card = Card(folder)
    card.tile_sizes = TILE_SIZES
    enter_engine(card)
    card.save()
    return folder


def enter_engine(card: Card, kind: str = "onnxruntime") -> None:
    """Enter the network that lies in a card's folder, as if the exporter's gate had passed it."""
    path = card.folder / "model.fp16.onnx"
    card.record("onnx_fp16", path, None, "tests")
    proof = Proof(sha256_of(path), "cpu", instruction_sets())
    card.engine = card.fallback = Engine(kind, "f32", path.name, 1.0, proof)


@pytest.fixture
def settings_for(tmp_path: Path) -> Callable[..., ServerSettings]:
    """Makes settings for a server on free ports."""

    def make(repository: Path, **changes: object) -> ServerSettings:
        http, grpc, metrics = free_ports(3)
        return ServerSettings(repository, tmp_path / "triton.log", tmp_path / "state", http, grpc, metrics, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def triton_server(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton with the network whose answer is known, for all tests of the session."""
    folder = tmp_path_factory.mktemp("triton")
    publish(tiny_artefacts, folder / "models", ModelSettings(max_batch_size=8))
    http, grpc, metrics = free_ports(3)
    settings = ServerSettings(folder / "models", folder / "triton.log", folder / "state", http, grpc, metrics)
    with TritonServer(settings) as server:
        yield server
