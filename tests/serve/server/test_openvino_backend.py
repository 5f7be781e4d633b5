"""Our own backend in C++ answers, refuses and ends as the python backend does, of which it takes the place."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from serve.models.backend import cpu_backend, engine_text
from serve.models.config import ModelSettings, RepositoryError
from serve.models.library import OWN_BACKEND, own_library
from serve.models.publish import publish, rollback
from serve.segment.segmenter import Segmenter
from serve.server.control import ModelControl, control_of
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.serve.conftest import TILE_SIZES
from tests.serve.server.conftest import MakeSettings
from unet.card import Card
from unet.card.records import Engine, Proof
from unet.files import sha256_of
from unet.machine import instruction_sets
from unet.names import HALF, INT8, INT8_FILE
from unet.processes import free_ports

pytestmark = pytest.mark.usefixtures("built")
OWN, PYTHON = "own", "python"
LARGEST = 1244


@pytest.fixture(scope="module")
def built() -> None:
    assert own_library().is_file(), "`make install` builds the backend"


def convolving_model() -> onnx.ModelProto:
    """A network with the served interface whose answers show each rounding: a convolution, a sigmoid, the middle."""
    kernel = np.random.default_rng(5).normal(0, 0.1, (1, 1, 9, 9)).astype(np.float32)
    constants = {
        "kernel": kernel,
        "scale": np.array(1 / 255, np.float32),
        "starts": np.array([88, 88], np.int64),
        "ends": np.array([-88, -88], np.int64),
        "axes": np.array([2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["wide", "scale"], ["scaled"]),
        helper.make_node("Slice", ["scaled", "starts", "ends", "axes"], ["middle"]),
        helper.make_node("Conv", ["middle", "kernel"], ["sum"]),
        helper.make_node("Sigmoid", ["sum"], ["share"]),
        helper.make_node("Cast", ["share"], ["probability"], to=TensorProto.FLOAT16),
    ]
    graph = helper.make_graph(
        nodes,
        "convolving",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 1, "H", "W"])],
        [helper.make_tensor_value_info("probability", TensorProto.FLOAT16, ["N", 1, "h", "w"])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card with an engine "in 8-bit integers", packed as the exporter packs one, and a fallback in float32."""
    import openvino

    folder = tmp_path_factory.mktemp("artefacts")
    half = folder / "model.fp16.onnx"
    onnx.save(convolving_model(), str(half))
    openvino.save_model(openvino.Core().read_model(half), folder / "model.xml", compress_to_fp16=False)
    with zipfile.ZipFile(folder / INT8_FILE, "w", zipfile.ZIP_STORED) as packed:
        for name in ("model.xml", "model.bin"):
            packed.write(folder / name, name)
            (folder / name).unlink()
    card = Card(folder)
    card.tile_sizes = TILE_SIZES
    engines = []
    for name, path, precision in ((INT8, folder / INT8_FILE, "int8"), (HALF, half, "f32")):
        card.record(name, path, None, "tests")
        proof = Proof(sha256_of(path), "cpu", instruction_sets())
        engines.append(Engine("openvino", precision, path.name, 1.0, proof))
    card.engine, card.fallback = engines
    card.save()
    return folder


@pytest.fixture(scope="module")
def server(artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton with the same network in both backends."""
    folder = tmp_path_factory.mktemp("triton")
    for name, backend in ((OWN, "openvino"), (PYTHON, "python")):
        settings = ModelSettings(name, backend=backend, max_batch_size=8, max_tile_size=LARGEST)
        publish(artefacts, folder / "models", settings)
    http, grpc, metrics = free_ports(3)
    configured = ServerSettings(
        folder / "models", folder / "log", folder / "state", http, grpc, metrics, model_control="explicit"
    )
    with TritonServer(configured) as running:
        yield running


@pytest.fixture
def control(server: TritonServer) -> ModelControl:
    return control_of(server.settings.state_dir)


def ask(server: TritonServer, model: str, image: np.ndarray[Any, Any]) -> Any:
    """The answer's shape and bytes, or the error's code and words."""
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    tensor = grpc.InferInput("image", list(image.shape), "UINT8")
    tensor.set_data_from_numpy(image)
    with grpc.InferenceServerClient(server.settings.grpc_url) as client:
        try:
            answer = client.infer(model, [tensor]).as_numpy("probability")
        except InferenceServerException as error:
            return error.status(), error.message()
    return answer.shape, answer.tobytes()


def noise(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("shape", [(1, 204, 204), (2, 204, 252), (3, 252, 252), (8, 204, 204), (5, 700, 636)])
def test_answers_are_those_of_the_python_backend_to_the_bit(server: TritonServer, shape: tuple[int, int, int]) -> None:
    image = noise(shape[0], 1, *shape[1:])
    own, python = (ask(server, model, image) for model in (OWN, PYTHON))
    assert own == python
    assert own[0] == (shape[0], 1, shape[1] - 184, shape[2] - 184)
    assert len(set(own[1])) > 16


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (
            (1, 1, 512, 252),
            "a tile of 512 pixels does not fit the network, which takes 188 + 16k: near are 508 and 524",
        ),
        ((1, 1, 100, 252), "near are 188"),
        ((1, 1, LARGEST, LARGEST + 16), "is too large for this server's memory: send tiles of at most 1244 x 1244"),
        ((9, 1, 204, 204), "batch-size must be <= 8"),
        ((1, 2, 204, 204), "unexpected shape"),
    ],
)
def test_errors_are_those_of_the_python_backend(
    server: TritonServer, shape: tuple[int, int, int, int], words: str
) -> None:
    own, python = (ask(server, model, np.zeros(shape, np.uint8)) for model in (OWN, PYTHON))
    assert own == (python[0], python[1].replace(f"'{PYTHON}'", f"'{OWN}'"))
    assert own[0] == "StatusCode.INVALID_ARGUMENT"
    assert words in own[1]


def test_a_tile_that_this_moments_memory_does_not_hold_is_refused(
    artefacts: Path, server: TritonServer, control: ModelControl
) -> None:
    """The configuration allows it, as on a machine with more memory."""
    publish(artefacts, server.settings.repository, ModelSettings("vast", backend="openvino", max_tile_size=187964))
    control.load("vast", 1)
    code, said = ask(server, "vast", np.zeros((1, 1, 30012, 30012), np.uint8))
    assert (code, "this server has" in said) == ("StatusCode.INVALID_ARGUMENT", True)


def test_requests_at_the_same_time_get_their_own_answers(server: TritonServer) -> None:
    images = [noise(1 + index % 3, 1, *((204, 252), (252, 204))[index % 2]) + np.uint8(index) for index in range(16)]
    with ThreadPoolExecutor(8) as pool:
        own = list(pool.map(lambda image: ask(server, OWN, image), images))
    assert own == [ask(server, PYTHON, image) for image in images]


@pytest.mark.parametrize("shared_memory", ["on", "off"])
def test_a_slice_by_the_client_is_the_same_either_way(server: TritonServer, shared_memory: str) -> None:
    image = noise(300, 310)
    found = []
    for model in (OWN, PYTHON):
        with Segmenter(server.settings.grpc_url, model, shared_memory=shared_memory, batch_size=3) as segmenter:
            found.append(segmenter.segment_slice(image))
    assert found[0].tobytes() == found[1].tobytes()


def test_both_compute_with_as_many_threads_and_count_alike(server: TritonServer) -> None:
    from tritonclient import grpc

    said = re.findall(r"(\w+) version 1: (openvino int8, \d+ threads)", server.settings.log.read_text())
    assert len({words for name, words in said if name in (OWN, PYTHON)}) == 1
    ask(server, OWN, noise(2, 1, 204, 204))
    with grpc.InferenceServerClient(server.settings.grpc_url) as client:
        statistics = client.get_inference_statistics(OWN).model_stats[0]
    done = statistics.inference_stats
    assert done.success.count >= 1
    assert 0 < done.compute_infer.ns <= done.success.ns
    assert statistics.inference_count >= statistics.execution_count >= 1


def test_a_model_is_loaded_again_under_a_new_version_and_after_a_reload(
    artefacts: Path, server: TritonServer, control: ModelControl
) -> None:
    repository, image = server.settings.repository, noise(1, 1, 204, 204)
    expected = ask(server, PYTHON, image)
    publish(artefacts, repository, ModelSettings("again", backend="openvino"))
    control.load("again", 1)
    control.reload("again")
    assert ask(server, "again", image) == expected
    publish(artefacts, repository, ModelSettings("again", backend="openvino", max_batch_size=2), load=control.load)
    rollback(repository, "again", load=control.load)
    control.canary("again", 20)
    assert ask(server, "again", image) == expected


Change = Callable[[Path], object]


def rewrite(name: str, old: str, new: str) -> Change:
    def change(version: Path) -> None:
        text = (version / name).read_text()
        assert old in text
        (version / name).write_text(text.replace(old, new))

    return change


def chosen_alone(version: Path) -> None:
    """An engine whose proof does not hold on this processor, and none in float32 beside it."""
    lines = (version / "engine.txt").read_text().splitlines()
    kept = [line for line in lines if not line.startswith("engine f32")]
    (version / "engine.txt").write_text("\n".join(kept) + "\n")
    flip(version)


def flip(version: Path) -> None:
    text = (version / "engine.txt").read_text()
    native = "engine int8 native"
    other = "engine int8 emulated"
    (version / "engine.txt").write_text(text.replace(native, other) if native in text else text.replace(other, native))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("network", lambda version: append(version / INT8_FILE), r"model\.int8\.zip is not the file that its card"),
        ("card", lambda version: append(version / "card.json"), r"card\.json is not the file that its card describes"),
        ("text", rewrite("engine.txt", "format 1", "format 2"), r"engine\.txt is damaged, or of another release"),
        ("none", lambda version: (version / "engine.txt").unlink(), r"engine\.txt cannot be read: publish"),
        ("lost", lambda version: (version / INT8_FILE).unlink(), r"model\.int8\.zip cannot be read: publish"),
        ("other", chosen_alone, "openvino int8 was proven on a CPU with other instructions than this one's"),
        ("kind", rewrite("engine.txt", "engine int8", "engine f32"), "is not the file|OpenVINO cannot load"),
    ],
)
def test_what_the_card_does_not_prove_is_not_served(
    artefacts: Path, server: TritonServer, control: ModelControl, name: str, change: Change, words: str
) -> None:
    published = publish(artefacts, server.settings.repository, ModelSettings(name, backend="openvino"))
    change(published.path)
    with pytest.raises(TritonError, match=words):
        control.load(name, 1)


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b" ")


@pytest.mark.parametrize("more", range(0, 65, 8))
def test_cards_of_any_length_are_recognised(
    artefacts: Path, server: TritonServer, control: ModelControl, more: int
) -> None:
    """The backend's own SHA-256, over the borders of its blocks."""
    name = f"length{more}"
    version = publish(artefacts, server.settings.repository, ModelSettings(name, backend="openvino")).path
    card = version / "card.json"
    card.write_text(card.read_text() + " " * (more + 64 - card.stat().st_size % 64))
    (version / "engine.txt").write_text(engine_text(Card.load(version)))
    control.load(name, 1)


def test_another_processor_gets_the_engine_in_float32(
    artefacts: Path, server: TritonServer, control: ModelControl
) -> None:
    flip(publish(artefacts, server.settings.repository, ModelSettings("elsewhere", backend="openvino")).path)
    control.load("elsewhere", 1)
    log = server.settings.log.read_text()
    assert "openvino f32 serves instead; export on this machine for the fastest engine" in log
    assert "elsewhere version 1: openvino f32" in log


def test_a_killed_server_is_told_and_starts_again_within_its_cores(
    artefacts: Path, tmp_path: Path, settings_for: MakeSettings
) -> None:
    publish(artefacts, tmp_path / "models", ModelSettings())
    settings = settings_for(tmp_path / "models", restarts=0)
    image = noise(3, 1, 204, 204)
    cores = os.sched_getaffinity(0)
    with TritonServer(settings) as server:
        answer = ask(server, "unet", image)
        assert isinstance(answer[1], bytes)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSEGV)
        with pytest.raises(TritonError, match="Triton ended by itself"):
            server.wait()
    os.sched_setaffinity(0, {min(cores)})
    try:
        with TritonServer(settings) as server:
            assert ask(server, "unet", image) == answer
            assert "openvino int8, 1 threads" in settings.log.read_text()
    finally:
        os.sched_setaffinity(0, cores)


def test_without_its_library_the_python_backend_serves_and_says_so(
    artefacts: Path,
    tmp_path: Path,
    settings_for: MakeSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(artefacts, tmp_path / "own", ModelSettings())
    config = (tmp_path / "own" / "unet" / "config.pbtxt").read_text()
    assert f'backend: "{OWN_BACKEND}"' in config
    assert not (tmp_path / "own" / "unet" / "1" / "model.py").exists()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    version = publish(artefacts, tmp_path / "python", ModelSettings()).path
    assert "the python backend serves instead" in capsys.readouterr().err
    assert (version / "model.py").is_file()
    assert 'backend: "python"' in (version / "config.pbtxt").read_text()
    with pytest.raises(RepositoryError, match=r"is not built .*publish with --backend python"):
        publish(artefacts, tmp_path / "python", ModelSettings(backend="openvino"))
    with pytest.raises(TritonError, match=r"wants the backend unet_openvino, which is not built here .*make install"):
        TritonServer(settings_for(tmp_path / "own")).start()


def test_what_onnx_runtime_computes_stays_in_the_python_backend(artefacts: Path, tmp_path: Path) -> None:
    card = Card.load(shutil.copytree(artefacts, tmp_path / "artefacts"))
    chosen = card.engine
    proof = card.fallback.proof if card.fallback else None
    card.engine = card.fallback = Engine("onnxruntime", "f32", "model.fp16.onnx", 1.0, proof)
    assert cpu_backend(card, "auto") == ("python", "")
    with pytest.raises(RepositoryError, match="OpenVINO does not run:"):
        cpu_backend(card, "openvino")
    # Float32 runs everywhere. Another format needs its fallback where a processor has no instructions for it.
    card.engine = dataclasses.replace(chosen, precision="f32")
    assert cpu_backend(card, "auto") == (OWN_BACKEND, "")
    card.engine = dataclasses.replace(chosen, precision="int8")
    assert cpu_backend(card, "auto") == ("python", "")


def test_engines_that_differ_from_the_card_are_found_before_the_start(
    artefacts: Path, tmp_path: Path, settings_for: MakeSettings
) -> None:
    version = publish(artefacts, tmp_path / "models", ModelSettings()).path
    flip(version)
    with pytest.raises(TritonError, match=r"engine\.txt does not say what card\.json beside it says"):
        TritonServer(settings_for(tmp_path / "models")).start()
