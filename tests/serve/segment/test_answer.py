"""Servers that answer wrongly: no pixel of such an answer is used, whichever way it comes, and another server helps."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from serve import Request, Segmenter, ServerError, segment_volume
from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.answer import check_probabilities
from serve.segment.errors import Action
from serve.server.control import control_of
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet.card import Card
from unet.processes import free_ports

RNG = np.random.default_rng(11)
ROOT = Path(__file__).resolve().parents[3]

# The first pixel of a slice says what is wrong with the answer to it; other slices are answered rightly.
SICK_MODEL = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
            answer = image[..., 92:-92, 92:-92].astype(np.float16) * np.float16(1 / 255)
            how = int(image[0, 0, 92, 92])
            if how == 255:
                answer[0, 0, 3, 4] = np.nan
            elif how == 254:
                answer[:] = np.nan
            elif how == 253:
                answer[0, 0, 3, 4] = -0.001
            elif how == 252:
                answer[0, 0, 3, 4] = 1.001
            elif how == 251:
                answer = answer[..., :-16, :-16]
            elif how == 250:
                answer = np.pad(answer, [(0, 0), (0, 0), (8, 8), (8, 8)])
            elif how == 249:
                answer = answer[:1]
            elif how == 248:
                raise MemoryError("out of memory")
            elif how == 247:
                answer[0, 0, 3, 4] = np.inf
            answer = np.ascontiguousarray(answer)
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("probability", answer)]))
        return responses
"""
OTHER_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        answers = [np.full_like(image[..., 92:-92, 92:-92], 0.5, dtype=np.float16) for image in images]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("probability", answer)]) for answer in answers]
"""


def expected(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (image.astype(np.float16) * np.float16(1 / 255)).astype(np.float32)


@pytest.fixture(scope="module")
def sick_url(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose model has the card of the session's server, and answers some slices wrongly."""
    folder = tmp_path_factory.mktemp("sick")
    version = publish(tiny_artefacts, folder / "models", ModelSettings(max_batch_size=8))
    (version.path / "model.py").write_text(SICK_MODEL)
    http, grpc, metrics = free_ports(3)
    settings = ServerSettings(folder / "models", folder / "log", folder / "state", http, grpc, metrics)
    with TritonServer(settings) as server:
        yield server.settings.grpc_url


@pytest.mark.parametrize("shared_memory", ["on", "off"])
@pytest.mark.parametrize(
    ("how", "words"),
    [
        (255, "1 values that are not from 0 to 1, nan"),
        (254, "values that are not from 0 to 1, nan"),
        (253, "1 values that are not from 0 to 1, -0.001"),
        (252, "1 values that are not from 0 to 1, 1.00"),
        (251, r"probability FP16 \[2, 1, 52, 52\] instead of probability FP16 \[2, 1, 68, 68\]"),
        (250, r"probability FP16 \[2, 1, 84, 84\] instead of|failed"),
        (249, r"probability FP16 \[1, 1, 68, 68\] instead of|failed"),
        (248, "has too little memory for unet version 1"),
        (247, "1 values that are not from 0 to 1, inf"),
    ],
)
def test_a_wrong_answer_is_an_error_and_another_server_helps(
    sick_url: str, triton_server: TritonServer, shared_memory: str, how: int, words: str
) -> None:
    image = RNG.integers(0, 247, (80, 20), np.uint8)
    image[0, 0] = how
    options: dict[str, Any] = {"shared_memory": shared_memory, "batch_size": 2}
    with Segmenter(sick_url, **options) as segmenter:
        with pytest.raises(ServerError, match=words):
            segmenter.segment_slice(image)
        # It can be used again.
        healthy = RNG.integers(0, 247, (80, 20), np.uint8)
        np.testing.assert_array_equal(segmenter.segment_slice(healthy), expected(healthy))
    with Segmenter((sick_url, triton_server.settings.grpc_url), **options) as segmenter:
        np.testing.assert_array_equal(segmenter.segment_slice(image), expected(image))


def test_a_wrong_answer_ends_a_run_resumably(sick_url: str, triton_server: TritonServer, tmp_path: Path) -> None:
    images = RNG.integers(0, 247, (6, 40, 40), np.uint8)
    images[4, 0, 0] = 255
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack")
    assert main([str(source), "--url", sick_url, "--quiet"]) == 2
    assert not list(tmp_path.glob("v-*"))
    assert main([str(source), "--url", triton_server.settings.grpc_url, "--quiet", "--resume"]) == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "v-probability.tif"), expected(images))


@given(st.integers(0, 2**16 - 1))
def test_the_gate_takes_what_is_from_0_to_1_and_nothing_else(bits: int) -> None:
    half = np.full((2, 1, 3, 3), 0.5, np.float16)
    half.view(np.uint16)[1, 0, 2, 1] = bits
    for values in (half, half.astype(np.float32)):
        if 0 <= float(half[1, 0, 2, 1]) <= 1:
            assert check_probabilities(values, values.shape, values.dtype, "x") is values
        else:
            with pytest.raises(ServerError, match="not from 0 to 1"):
                check_probabilities(values, values.shape, values.dtype, "x")


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_gate_says_what_is_wrong(dtype: type[np.floating[Any]]) -> None:
    # Minus zero is from 0 to 1, beside whatever else is.
    values = np.array([-0.0, 0, 0.5, 1], dtype).reshape(1, 1, 2, 2)
    assert check_probabilities(values, (1, 1, 2, 2), dtype, "here") is values
    values[0, 0, 1] = 1.5, np.nan
    with pytest.raises(ServerError) as caught:
        check_probabilities(values, values.shape, dtype, "here")
    assert str(caught.value).startswith("here answered with 2 values that are not from 0 to 1, 1.5 the first of them: ")
    assert caught.value.action is Action.LEAVE
    other = np.float32 if dtype is np.float16 else np.float16
    for shape, due in (((1, 1, 2, 3), dtype), (values.shape, other)):
        with pytest.raises(ServerError) as caught:
            check_probabilities(values, shape, due, "here")
        said = f"here answered with {values.dtype} [1, 1, 2, 2] instead of {np.dtype(due)} {list(shape)}: "
        assert str(caught.value).startswith(said)


@pytest.fixture
def other_artefacts(tiny_artefacts: Path, tmp_path: Path) -> Path:
    """Artefacts with a card of their own."""
    folder = tmp_path / "other-artefacts"
    shutil.copytree(tiny_artefacts, folder)
    card = Card.load(folder)
    card.record("fp16_onnx", folder / "model.fp16.onnx", None, "another one")
    card.save()
    return folder


@pytest.fixture
def server(tiny_artefacts: Path, settings_for: Callable[..., ServerSettings], tmp_path: Path) -> Iterator[TritonServer]:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models", model_control="explicit", restarts=0)) as running:
        yield running


def publish_other(server: TritonServer, artefacts: Path) -> None:
    """Have a server take a network that answers 0.5 everywhere."""
    load = control_of(server.settings.state_dir, server.settings.repository).load

    def load_it(model: str, version: int) -> None:
        (server.settings.repository / model / str(version) / "model.py").write_text(OTHER_MODEL)
        load(model, version)

    publish(artefacts, server.settings.repository, ModelSettings(max_batch_size=8), load=load_it)


class Meddling(Segmenter):
    """Does something once some slices are segmented."""

    def __init__(self, url: str, meddle: Callable[[], None], **options: Any) -> None:
        super().__init__(url, **options)
        self._meddle = meddle

    def segment_bands(self, jobs: Any, *window: Any) -> Any:
        for index, answer in enumerate(super().segment_bands(jobs, *window)):
            if index == 5:
                self._meddle()
            yield answer


def test_a_version_published_in_the_middle_of_a_stack_changes_nothing(
    server: TritonServer, other_artefacts: Path, tmp_path: Path
) -> None:
    images = RNG.integers(0, 256, (30, 40, 40), np.uint8)
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack")
    with Meddling(server.settings.grpc_url, lambda: publish_other(server, other_artefacts)) as segmenter:
        segment_volume(segmenter, source, Request(quiet=True))
    with tifffile.TiffFile(tmp_path / "v-probability.tif") as tiff:
        np.testing.assert_array_equal(tiff.asarray(), expected(images))
        assert "model version 1 " in tiff.pages.first.software
    # Who connects now gets the new one.
    with Segmenter(server.settings.grpc_url) as segmenter:
        assert segmenter.interface.version == "2"
        assert (segmenter.segment_slice(images[0]) == 0.5).all()
    # Its predecessor by name, with its own card.
    with Segmenter(server.settings.grpc_url, model_version="1") as segmenter:
        assert segmenter.interface.card_sha256 != Segmenter(server.settings.grpc_url).interface.card_sha256
        np.testing.assert_array_equal(segmenter.segment_slice(images[0]), expected(images[0]))


def test_a_version_that_is_served_no_longer_stops_the_run_with_the_reason(
    server: TritonServer, triton_server: TritonServer, other_artefacts: Path, tmp_path: Path
) -> None:
    images = RNG.integers(0, 256, (30, 40, 40), np.uint8)
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack")

    def publish_twice() -> None:
        for _ in range(2):
            publish_other(server, other_artefacts)

    with (
        Meddling(server.settings.grpc_url, publish_twice, patience_s=1, in_flight=1) as segmenter,
        pytest.raises(ServerError, match=r"does not serve unet version 1, but 2, 3.*add --resume to go on with it"),
    ):
        segment_volume(segmenter, source, Request(quiet=True))
    assert not list(tmp_path.glob("v-*"))
    # The same network is served elsewhere.
    assert main([str(source), "--url", triton_server.settings.grpc_url, "--quiet", "--resume"]) == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "v-probability.tif"), expected(images))


def test_two_versions_published_within_a_stack_and_the_advice_of_the_message_followed_word_for_word(
    tiny_artefacts: Path, other_artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = RNG.integers(0, 256, (30, 40, 40), np.uint8)
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack")
    # Where the commands look if they are told nothing.
    monkeypatch.chdir(tmp_path)
    publish(tiny_artefacts, "model_repository", ModelSettings(max_batch_size=8))
    http, grpc, metrics = free_ports(3)
    places = Path("model_repository"), Path("triton.log"), Path(".cache/triton")
    with TritonServer(ServerSettings(*places, http, grpc, metrics, model_control="explicit")) as server:
        url = server.settings.grpc_url

        def publish_twice() -> None:
            for _ in range(2):
                publish_other(server, other_artefacts)

        with (
            Meddling(url, publish_twice, patience_s=1, in_flight=1) as segmenter,
            pytest.raises(ServerError) as caught,
        ):
            segment_volume(segmenter, source, Request(quiet=True))
        said = str(caught.value)
        advice = re.findall("`python (.+?)`|add (--resume)", said)
        command = "serve/repository.py --rollback --model_name unet --version 1 --load"
        assert advice == [(command, ""), ("", "--resume")], said
        script, *words = shlex.split(command)
        done = subprocess.run([sys.executable, str(ROOT / script), *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert main([str(source), "--url", url, "--quiet", "--resume"]) == 0
        with Segmenter(url) as segmenter:
            assert segmenter.interface.version == "4"
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "v-probability.tif"), expected(images))


def test_after_a_restart_the_model_is_looked_at_again(
    server: TritonServer, other_artefacts: Path, tmp_path: Path
) -> None:
    """Under the same version number another network is served."""
    images = RNG.integers(0, 256, (30, 40, 40), np.uint8)
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack")

    def restart() -> None:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        shutil.rmtree(server.settings.repository)
        version = publish(other_artefacts, server.settings.repository, ModelSettings(max_batch_size=8))
        (version.path / "model.py").write_text(OTHER_MODEL)
        server.start()

    with (
        Meddling(server.settings.grpc_url, restart, patience_s=60, in_flight=1) as segmenter,
        pytest.raises(Exception, match="serves another unet version 1 than the run began with"),
    ):
        segment_volume(segmenter, source, Request(quiet=True))
    assert not list(tmp_path.glob("v-*"))
