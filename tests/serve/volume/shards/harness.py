"""What torture and sizes share: a server with the network whose answer is known, and volumes made by block."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import zarr

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.serve.conftest import cropping_model, enter_engine
from unet.card import Card
from unet.processes import free_ports


@contextlib.contextmanager
def served(tile_sizes: tuple[int, ...]) -> Iterator[str]:
    """A real Triton with a network that gives the middle of its tile back; yields its gRPC address."""
    with tempfile.TemporaryDirectory(prefix="unet-shards-") as name:
        folder = Path(name)
        onnx.save(cropping_model(), str(folder / "model.fp16.onnx"))
        card = Card(folder)
        card.tile_sizes = tile_sizes
        enter_engine(card)
        card.save()
        publish(folder, folder / "models", ModelSettings(max_batch_size=8))
        http, grpc, metrics = free_ports(3)
        settings = ServerSettings(folder / "models", folder / "triton.log", folder / "state", http, grpc, metrics)
        with TritonServer(settings) as server:
            yield server.settings.grpc_url


def tiles_computed(url: str) -> int:
    """Tiles that the server has computed since it started."""
    import tritonclient.grpc as grpc

    with grpc.InferenceServerClient(url) as client:
        return int(client.get_inference_statistics("unet").model_stats[0].inference_count)


def make_blocks(path: Path, shape: tuple[int, int, int], chunks: tuple[int, int, int], *, every: int = 1) -> Path:
    """An 8-bit OME-Zarr volume, a block of chunks at a time; of so many blocks one holds noise, the others nothing."""
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    array = group.create_array("0", shape=shape, chunks=chunks, dtype="uint8")
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [40.0, 4.0, 4.0]}]}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    rng = np.random.default_rng(5)
    for number, z in enumerate(range(0, shape[0], chunks[0])):
        if number % every == 0:
            depth = min(chunks[0], shape[0] - z)
            array[z : z + depth] = rng.integers(0, 256, (depth, *shape[1:]), np.uint8)
    return path
