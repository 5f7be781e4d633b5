from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve import ClientError, Segmenter
from serve.client import main
from serve.models.config import ModelSettings, model_config
from serve.segment.connection import Connection
from serve.segment.slot import SharedSlot
from serve.segment.slots import remove_dead_segments
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet.card import Card
from unet.engine.cpu import CpuEngine, EngineChoice
from unet.geometry import cheapest_tile_size, plan_tiles, predict_tiled
from unet.names import OUTPUT
from unet.processes import free_ports

SHARED_MEMORY = Path("/dev/shm")
RNG = np.random.default_rng(0)


def our_segments() -> set[str]:
    """Of this process alone: other tests may run beside this one."""
    return {path.name for path in SHARED_MEMORY.glob(f"unet-client-{os.getpid()}-*")}


def expected(image: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """What the test's network answers: the intensity as a float16 share of 255."""
    return (image.astype(np.float16) * np.float16(1 / 255)).astype(np.float32)


def registered(url: str) -> set[str]:
    """The clients' regions that a server knows."""
    import tritonclient.grpc as grpc

    with grpc.InferenceServerClient(url) as client:
        return {name for name in client.get_system_shared_memory_status().regions if name.startswith("unet-client-")}


def own_regions(url: str) -> set[str]:
    """Those of this process."""
    return {name for name in registered(url) if name.startswith(f"unet-client-{os.getpid()}-")}


@pytest.fixture(scope="session")
def url(triton_server: TritonServer) -> str:
    return triton_server.settings.grpc_url


# As the served network; an image that begins with 255 takes its time.
SLOW_MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
            if image[0, 0, 92, 92] == 255:
                time.sleep(1.5)
            answer = image[..., 92:-92, 92:-92].astype(np.float16) * np.float16(1 / 255)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("probability", answer)]))
        return responses
"""


@pytest.fixture(scope="module")
def odd_url(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with models that a client may meet: ``slow``, ``wide`` (float32 answers), ``bare`` (no tile sizes)."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    folder = tmp_path_factory.mktemp("odd")
    for name in ("slow", "wide", "bare"):
        config = model_config(Card.load(tiny_artefacts), ModelSettings(name, max_batch_size=4, instances=2))
        if name == "wide":
            config.output[0].data_type = pb.TYPE_FP32
        if name == "bare":
            del config.parameters["tile_sizes"]
        # So that two requests go to two instances.
        config.ClearField("dynamic_batching")
        config.ClearField("model_warmup")
        (folder / "models" / name / "1").mkdir(parents=True)
        (folder / "models" / name / "1" / "model.py").write_text(SLOW_MODEL)
        (folder / "models" / name / "config.pbtxt").write_text(text_format.MessageToString(config))
    http, grpc, metrics = free_ports(3)
    server_settings = ServerSettings(folder / "models", folder / "triton.log", folder / "state", http, grpc, metrics)
    with TritonServer(server_settings):
        yield server_settings.grpc_url


@pytest.mark.parametrize("shared_memory", ["on", "off"])
@settings(deadline=None, max_examples=15)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 150), st.integers(1, 150)), min_size=1, max_size=5),
    batch_size=st.integers(1, 5),
    in_flight=st.integers(1, 4),
)
def test_every_slice_comes_back_in_its_place(
    url: str, shared_memory: str, sizes: list[tuple[int, int]], batch_size: int, in_flight: int
) -> None:
    images = [RNG.integers(0, 256, size, np.uint8) for size in sizes]
    with Segmenter(url, shared_memory=shared_memory, batch_size=batch_size, in_flight=in_flight) as segmenter:
        answers = list(segmenter.segment(images))
        assert bool(own_regions(url)) == (shared_memory == "on")
    assert len(answers) == len(images)
    for image, answer in zip(images, answers):
        assert answer.dtype == np.float32
        np.testing.assert_array_equal(answer, expected(image))
    assert our_segments() == set()


@pytest.mark.parametrize("shape", [(37, 300), (500, 64)])
def test_the_answer_is_the_engines_own_on_the_same_tiles(
    url: str, tiny_artefacts: Path, shape: tuple[int, int]
) -> None:
    image = RNG.integers(0, 256, shape, np.uint8)
    engine = CpuEngine(tiny_artefacts / "model.fp16.onnx", EngineChoice("onnxruntime", "f32"), 1)
    with Segmenter(url, batch_size=3) as segmenter:
        plan = plan_tiles(*shape, cheapest_tile_size(*shape, segmenter.interface.tile_sizes))
        assert len(plan) > 3
        direct = predict_tiled(image, plan, lambda tiles: engine.infer(tiles[:, np.newaxis])[:, 0])
        np.testing.assert_array_equal(segmenter.segment_slice(image), direct.astype(np.float32))


def test_a_request_takes_tiles_of_several_slices(triton_server: TritonServer) -> None:
    import tritonclient.grpc as grpc

    url = triton_server.settings.grpc_url
    images = [RNG.integers(0, 256, (20, 20), np.uint8) for _ in range(21)]
    with grpc.InferenceServerClient(url) as client, Segmenter(url, batch_size=8) as segmenter:

        def requests() -> int:
            [stats] = client.get_inference_statistics("unet").model_stats
            return int(stats.inference_stats.success.count)

        before = requests()
        for image, answer in zip(images, segmenter.segment(images)):
            np.testing.assert_array_equal(answer, expected(image))
        # The server counts a request after it has answered it.
        deadline = time.monotonic() + 10
        while requests() - before < 3 and time.monotonic() < deadline:
            pass
        assert requests() - before == 3


def test_a_slow_slice_holds_its_place_and_the_others_back(odd_url: str) -> None:
    taken = 0

    def stack() -> Iterator[Any]:
        nonlocal taken
        for index in range(60):
            taken += 1
            yield np.full((20, 20), 255 if index == 0 else index, np.uint8)

    with Segmenter(odd_url, "slow", in_flight=2) as segmenter:
        answers = segmenter.segment(stack())
        first = next(answers)
        assert taken <= 4
        for index, answer in enumerate([first, *answers]):
            np.testing.assert_array_equal(answer, expected(np.full((20, 20), index or 255, np.uint8)))
    assert taken == 60


def test_slices_are_taken_one_by_one(url: str) -> None:
    """A stack need not fit into memory: the reader is never far ahead of the writer."""
    taken = 0

    def stack() -> Any:
        nonlocal taken
        for _ in range(40):
            taken += 1
            yield np.zeros((60, 60), np.uint8)

    with Segmenter(url, in_flight=2) as segmenter:
        ahead = [taken - given for given, _ in enumerate(segmenter.segment(stack()), 1)]
    assert taken == 40
    assert max(ahead) <= 4


def test_the_interface_is_read_from_the_server(url: str) -> None:
    with Segmenter(url) as segmenter:
        assert segmenter.interface.tile_sizes == (204, 252)
        assert segmenter.interface.max_batch_size == 8


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"model_name": "other"}, "does not serve other"),
        ({"batch_size": 9}, "more than the 8"),
        ({"shared_memory": "maybe"}, "not one of auto, on, off"),
        ({"in_flight": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_connected(url: str, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ClientError, match=sentence):
        Segmenter(url, **arguments)


def test_a_slice_of_another_kind_is_refused(url: str) -> None:
    with Segmenter(url) as segmenter, pytest.raises(ClientError, match=r"must be uint8 \[H, W\]"):
        segmenter.segment_slice(np.zeros((4, 4), np.uint16))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ("wide", "is not a U-Net of this project"),
        ("bare", "names no usable tile size"),
        ("gone", "does not serve gone"),
    ],
)
def test_another_model_is_refused(odd_url: str, model: str, sentence: str) -> None:
    with pytest.raises(ClientError, match=sentence):
        Segmenter(odd_url, model)


def test_a_version_that_is_not_served_is_named(url: str) -> None:
    with pytest.raises(ClientError, match="does not serve unet version 7"):
        Segmenter(url, model_version="7")


@pytest.mark.parametrize("shared_memory", ["on", "off"])
def test_after_a_deadline_the_next_answer_is_right(odd_url: str, shared_memory: str) -> None:
    slow, quick = np.full((40, 40), 255, np.uint8), RNG.integers(0, 255, (40, 40), np.uint8)
    before = own_regions(odd_url)
    with Segmenter(odd_url, "slow", timeout_s=0.5, shared_memory=shared_memory) as segmenter:
        with pytest.raises(ClientError, match=r"gave no answer in 0\.5 s: see its log, or raise --timeout_s"):
            segmenter.segment_slice(slow)
        connection = segmenter._dispatcher.pool.servers[0].connection
        assert connection is not None
        connection.timeout_s = 60
        until = time.monotonic() + 2
        # The late answer comes in between, and must not end up in another slice.
        while time.monotonic() < until:
            np.testing.assert_array_equal(segmenter.segment_slice(quick), expected(quick))
        assert bool(own_regions(odd_url) - before) == (shared_memory == "on")


def test_memory_that_an_answered_request_is_still_in_is_forgotten_a_moment_later(
    odd_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton refuses to forget a region while a request holds it, which it does for a moment after the answer."""
    # This request is in it for 1.5 s, and a busy machine adds to that.
    monkeypatch.setattr("serve.segment.slot.FORGET_TIMEOUT_S", 20.0)
    connection = Connection(odd_url, "slow", "", 10)
    slot = SharedSlot(connection, (1, 1, 204, 204))
    slot.images[...] = 255
    inputs, outputs = slot.tensors(connection.grpc, 1)
    answered = threading.Event()
    try:
        connection.client.async_infer("slow", inputs, lambda result, error: answered.set(), outputs=outputs)
        # A few round trips later the server has begun with it.
        for _ in range(50):
            connection.client.is_server_ready()
        with pytest.raises(connection.grpc.InferenceServerException, match="in use"):
            connection.client.unregister_system_shared_memory(slot._names[OUTPUT])
        assert slot.close()
        assert not registered(odd_url) & set(slot._names.values())
        assert answered.wait(10)
    finally:
        connection.close()


def test_forgotten_shared_memory_is_made_known_again(url: str) -> None:
    """As after perf_analyzer, which has the server forget everyone's."""
    import tritonclient.grpc as grpc

    image = RNG.integers(0, 256, (50, 50), np.uint8)
    with Segmenter(url, shared_memory="on", in_flight=1) as segmenter:
        segmenter.segment_slice(image)
        with grpc.InferenceServerClient(url) as other:
            other.unregister_system_shared_memory()
        np.testing.assert_array_equal(segmenter.segment_slice(image), expected(image))
        assert segmenter.resent == 1
        assert own_regions(url)


def test_too_little_shared_memory_is_done_without(url: str, caplog: pytest.LogCaptureFixture) -> None:
    image = np.full((60, 60), 51, np.uint8)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with Segmenter(url) as segmenter:
            np.testing.assert_array_equal(segmenter.segment_slice(image), expected(image))
            assert not own_regions(url)
        assert "the pixels are sent: /dev/shm has too little room" in caplog.text
        with Segmenter(url, shared_memory="on") as segmenter:
            with pytest.raises(ClientError, match="cannot share memory with this process"):
                segmenter.segment_slice(image)
            assert registered(url) == set()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_the_command_writes_what_it_should(url: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (5, 90, 110), np.uint8)
    source = tmp_path / "volume.tif"
    tifffile.imwrite(source, images, imagej=True, resolution=(0.25, 0.25), metadata={"spacing": 50.0, "unit": "nm"})
    line = [sys.executable, "serve/client.py", str(source), "--url", url, "--json", "--overlay_slice", "3"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    # Quiet where nobody watches: the summary is all that is said.
    assert done.stderr == ""
    summary = json.loads(done.stdout)
    assert (summary["slices"], summary["height"], summary["width"], summary["window"]) == (5, 90, 110, None)
    with tifffile.TiffFile(tmp_path / "volume-probability.tif") as tiff:
        assert tiff.imagej_metadata is not None
        assert (tiff.imagej_metadata["spacing"], tiff.imagej_metadata["unit"]) == (50.0, "nm")
        assert tiff.pages.first.dtype == np.float32
        np.testing.assert_array_equal(tiff.asarray(), expected(images))
    picture = np.asarray(Image.open(tmp_path / "volume-overlay.png"))
    assert picture.shape == (90, 110 * 2 + 8, 3)
    np.testing.assert_array_equal(picture[:, :110, 0], images[3])


def test_uint16_goes_through_a_window(url: str, tmp_path: Path) -> None:
    images = RNG.integers(1000, 3000, (2, 70, 70)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "wide.tif", images, photometric="minisblack")
    assert main([str(tmp_path / "wide.tif"), "--url", url, "--window", "1000", "3000", "--quiet"]) == 0
    scaled = np.rint((images.astype(np.float32) - 1000) * np.float32(255 / 2000)).astype(np.uint8)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "wide-probability.tif"), expected(scaled))
    assert main([str(tmp_path / "wide.tif"), "--url", url, "--overwrite", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--url", "localhost:1"], "no server answers at localhost:1: start one with `make serve`"),
        (["--overlay_slice", "2"], "there is no slice 2 to draw"),
        (["--window", "5", "5"], "is empty"),
        (["--url", "nonsense"], "nonsense"),
        (["--url", "localhost:1", "--url", "localhost:2"], "none of localhost:1, localhost:2 serves unet"),
        (["--threshold", "2"], "--threshold is 2; it must be from 0 to 1"),
    ],
)
def test_faults_are_one_sentence_and_leave_nothing(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    source = tmp_path / "volume.tif"
    tifffile.imwrite(source, np.zeros((2, 20, 20), np.uint8), photometric="minisblack")
    where = [] if "--url" in arguments else ["--url", url]
    assert main([str(source), *where, "--timeout_s", "5", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["volume.tif"]
    assert our_segments() == set()


def test_patterns_name_several_stacks(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((2, 20, 20), np.uint8), photometric="minisblack")
    out = tmp_path / "out"
    assert main([str(tmp_path / "*.tif"), "--url", url, "--output", "mask", "--output_dir", str(out), "--quiet"]) == 0
    assert {path.name for path in out.iterdir()} == {"a-mask.tif", "b-mask.tif"}
    assert main([str(tmp_path / "no-such-*.tif"), "--url", url]) == 2
    assert "nothing matches" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "volume.tif"
    tifffile.imwrite(source, np.zeros((2, 20, 20), np.uint8), photometric="minisblack")
    kept = tmp_path / "volume-probability.tif"
    kept.write_text("mine")
    assert main([str(source), "--url", url]) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert kept.read_text() == "mine"
    assert main([str(source), "--url", url, "--overwrite", "--quiet"]) == 0
    assert tifffile.imread(kept).shape == (2, 20, 20)


def test_an_ome_stack_keeps_its_name_and_pixel_size(url: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, 40, 50), np.uint8)
    source = tmp_path / "cells.ome.tif"
    tifffile.imwrite(source, images, ome=True, metadata={"axes": "ZYX", "PhysicalSizeX": 0.004, "PhysicalSizeY": 0.004})
    assert main([str(source), "--url", url, "--quiet"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("cells.ome.tif", "cells-probability.ome.tif", "cells-overlay.png")
    }
    with tifffile.TiffFile(tmp_path / "cells-probability.ome.tif") as tiff:
        assert tiff.is_ome
        assert 'PhysicalSizeX="0.004"' in str(tiff.ome_metadata)
        np.testing.assert_array_equal(tiff.asarray(), expected(images))


@pytest.mark.parametrize("arguments", [["{0}", "{1}", "--output_dir", "{2}"]])
def test_results_never_go_over_an_input_or_each_other(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    sources = [tmp_path / name / "volume.tif" for name in ("a", "b")]
    for source in sources:
        source.parent.mkdir()
        tifffile.imwrite(source, np.zeros((2, 20, 20), np.uint8), photometric="minisblack")
    line = [argument.format(*sources, tmp_path / "out") for argument in arguments]
    assert main([*line, "--url", url, "--overwrite"]) == 2
    assert "over what belongs to" in capsys.readouterr().err
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sources
    assert tifffile.imread(sources[0]).dtype == np.uint8


def test_a_server_that_stops_answering_costs_nothing_that_was_found(
    odd_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = RNG.integers(0, 255, (6, 40, 40), np.uint8)
    images[4, 0, 0] = 255
    source = tmp_path / "volume.tif"
    tifffile.imwrite(source, images, photometric="minisblack")
    flags = ["--url", odd_url, "--model_name", "slow", "--quiet"]
    assert main([str(source), *flags, "--timeout_s", "0.5"]) == 2
    assert "add --resume to go on" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"volume.tif", "volume.partial"}
    # What is kept is not thrown away unasked, nor taken for another stack's.
    assert main([str(source), *flags]) == 2
    assert "add --resume to go on with it, or --overwrite to begin anew" in capsys.readouterr().err
    assert main([str(source), *flags, "--resume", "--window", "0", "9"]) == 2
    assert "belongs to another intensity window (null, now [0.0, 9.0])" in capsys.readouterr().err
    assert main([str(source), *flags[:-1], "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recalled"] >= 1
    assert {path.name for path in tmp_path.iterdir()} == {
        *("volume.tif", "volume-probability.tif", "volume-overlay.png")
    }
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "volume-probability.tif"), expected(images))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_an_interrupted_client_leaves_no_shared_memory(url: str, number: int) -> None:
    code = (
        "import sys, numpy as np; from serve.client import Segmenter; from unet.errors import command\n"
        "@command\n"
        "def main(argv=None):\n"
        "    with Segmenter(sys.argv[1], shared_memory='on', in_flight=2) as segmenter:\n"
        "        for _ in segmenter.segment(np.zeros((60, 60), np.uint8) for _ in range(10**9)):\n"
        "            print('going', flush=True)\n"
        "sys.exit(main())\n"
    )
    line = [sys.executable, "-c", code, url]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        mine = f"unet-client-{process.pid}-"
        assert len([name for name in registered(url) if name.startswith(mine)]) == 4
        # They lost their names once the server had mapped them.
        assert our_segments() == set()
        process.send_signal(number)
        try:
            process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert our_segments() == set()
    if number != signal.SIGKILL:
        assert not [name for name in registered(url) if name.startswith(mine)]


def test_segments_of_killed_clients_are_removed() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    dead, mine = (SHARED_MEMORY / f"unet-client-{pid}-0-in" for pid in (process.pid, os.getpid()))
    try:
        dead.touch()
        mine.touch()
        remove_dead_segments()
        assert (dead.exists(), mine.exists()) == (False, True)
    finally:
        dead.unlink(missing_ok=True)
        mine.unlink(missing_ok=True)
