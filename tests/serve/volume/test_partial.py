"""Nothing is lost: the client or the server killed at a random page, and torn results."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from serve import ClientError, Segmenter, ServerError
from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.errors import Action
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from serve.volume.partial import JOURNAL, Partial, RawStore
from unet.card import Card

RNG = np.random.default_rng(1)
PAGES = 60
# Tiles are small and many, so that a slice takes a few milliseconds.
SHAPE = (PAGES, 200, 230)


@pytest.fixture(scope="module")
def url(triton_server: TritonServer) -> str:
    return triton_server.settings.grpc_url


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "volume.tif"
    pixels = RNG.integers(0, 256, SHAPE, np.uint8)
    tifffile.imwrite(path, pixels, imagej=True, resolution=(0.25, 0.25), metadata={"unit": "nm"})
    return path


def undisturbed(source: Path, url: str, *flags: str) -> dict[str, bytes]:
    """The outputs of a run that nothing happened to, by name."""
    out = source.parent / "whole"
    assert main([str(source), "--url", url, "--output_dir", str(out), "--quiet", *flags]) == 0
    return {path.name: path.read_bytes() for path in out.iterdir()}


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def pages_done(folder: Path) -> int:
    journal = folder / JOURNAL
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else -1


def await_pages(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many pages are finished; the process's end would be a failure."""
    while pages_done(folder) < count:
        assert process.poll() is None, process.communicate()
        os.sched_yield()


@pytest.fixture
def server(tiny_artefacts: Path, settings_for: Callable[..., ServerSettings], tmp_path: Path) -> Iterator[TritonServer]:
    """A server of the test's own, to be killed."""
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models", restarts=0)) as running:
        yield running


@pytest.mark.parametrize("seed", [1, 2])
def test_a_killed_client_loses_no_page(url: str, source: Path, seed: int) -> None:
    flags = [f"--output={kind}" for kind in ("probability", "mask", "labels", "overlay")]
    whole = undisturbed(source, url, *flags)
    out = source.parent / "out"
    line = [sys.executable, "serve/client.py", str(source), "--url", url, "--output_dir", str(out), *flags]
    stop_at = random.Random(seed).randrange(1, PAGES * 2 // 3)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        await_pages(out / "volume.partial", stop_at, process)
        process.kill()
    assert {path.name for path in out.iterdir()} == {"volume.partial"}
    found = pages_done(out / "volume.partial")
    done = subprocess.run([*line, "--resume", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["recalled"] >= found >= stop_at
    assert outputs(out) == whole


def test_a_killed_server_that_comes_back_goes_unnoticed(url: str, source: Path, server: TritonServer) -> None:
    whole = undisturbed(source, url)
    out = source.parent / "out"
    line = [sys.executable, "serve/client.py", str(source), "--url", server.settings.grpc_url, "--json"]
    line += ["--output_dir", str(out), "--patience_s", "120"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        await_pages(out / "volume.partial", random.Random(3).randrange(1, PAGES // 2), process)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        server.start()
        said, complaint = process.communicate(timeout=120)
    assert process.returncode == 0, complaint
    assert json.loads(said)["resent"] >= 1
    assert outputs(out) == whole


def test_a_server_gone_for_good_is_one_sentence_and_the_run_goes_on_elsewhere(
    url: str, source: Path, server: TritonServer
) -> None:
    whole = undisturbed(source, url)
    out = source.parent / "out"
    line = [sys.executable, "serve/client.py", str(source), "--output_dir", str(out), "--patience_s", "0.3"]
    with subprocess.Popen(
        [*line, "--url", server.settings.grpc_url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        await_pages(out / "volume.partial", 5, process)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    said = [line for line in complaint.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 2
    assert said[0].endswith("connecting again")
    assert said[1].startswith("error: no server answers at")
    assert "volume.partial, add --resume to go on with it" in said[1]
    assert main([str(source), "--url", url, "--output_dir", str(out), "--resume", "--quiet"]) == 0
    assert outputs(out) == whole


def test_the_next_address_takes_over(url: str, server: TritonServer) -> None:
    images = [RNG.integers(0, 256, (60, 70), np.uint8) for _ in range(40)]
    with Segmenter(url) as one:
        expected = list(one.segment(images))
    with Segmenter((server.settings.grpc_url, url), in_flight=3) as segmenter:
        answers = segmenter.segment(images)
        found = [next(answers)]
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        found.extend(answers)
        assert segmenter.resent >= 1
    np.testing.assert_array_equal(found, expected)


def test_a_frozen_server_is_left_at_the_deadline(url: str, server: TritonServer) -> None:
    image = RNG.integers(0, 256, (60, 70), np.uint8)
    with Segmenter((server.settings.grpc_url, url), timeout_s=0.5, patience_s=60) as segmenter:
        expected = segmenter.segment_slice(image)
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            np.testing.assert_array_equal(segmenter.segment_slice(image), expected)
        finally:
            os.kill(server.pid, signal.SIGCONT)


def test_servers_with_different_models_are_not_mixed(
    tiny_artefacts: Path, server: TritonServer, tmp_path: Path, settings_for: Callable[..., ServerSettings]
) -> None:
    shutil.copytree(tiny_artefacts, tmp_path / "artefacts")
    card = Card.load(tmp_path / "artefacts")
    card.tile_sizes = (204,)
    card.save()
    publish(tmp_path / "artefacts", tmp_path / "others", ModelSettings(max_batch_size=8))
    settings = settings_for(tmp_path / "others")
    other = ServerSettings(
        settings.repository, tmp_path / "other.log", tmp_path / "other", settings.http_port, settings.grpc_port,
        settings.metrics_port,
    )  # fmt: skip
    image = np.zeros((40, 40), np.uint8)
    with TritonServer(other), Segmenter((server.settings.grpc_url, other.grpc_url), patience_s=2) as segmenter:
        segmenter.segment_slice(image)
        server.stop()
        with pytest.raises(ServerError, match="serves another unet version 1 than the run began with") as caught:
            segmenter.segment_slice(image)
        # The next stack would meet the same.
        assert caught.value.action is not Action.STOP


def test_a_server_that_stays_away_is_a_typed_error(server: TritonServer) -> None:
    image = np.zeros((40, 40), np.uint8)
    with Segmenter(server.settings.grpc_url, patience_s=0.2) as segmenter:
        segmenter.segment_slice(image)
        server.stop()
        with pytest.raises(ServerError, match="no server answers"):
            segmenter.segment_slice(image)
        server.start()
        np.testing.assert_array_equal(segmenter.segment_slice(image), np.zeros((40, 40), np.float32))


# Answers one request at a time, each after a while, so that a short queue is full.
_TARDY = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.03)
        answers = []
        for request in requests:
            image = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
            answer = image[..., 92:-92, 92:-92].astype(np.float16) * np.float16(1 / 255)
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor("probability", answer)]))
        return answers
"""


def test_a_full_queue_holds_clients_back_and_fails_none(
    tiny_artefacts: Path, tmp_path: Path, settings_for: Callable[..., ServerSettings]
) -> None:
    version = publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=1, max_queue_size=1))
    (version.path / "model.py").write_text(_TARDY)
    images = [np.full((20, 20), value, np.uint8) for value in range(6)]
    resent: list[int] = []
    wrong: list[int] = []

    def client(url: str) -> None:
        with Segmenter(url, in_flight=3) as segmenter:
            for value, answer in enumerate(segmenter.segment(images)):
                if not (answer == np.float32(np.float16(value) * np.float16(1 / 255))).all():
                    wrong.append(value)
            resent.append(segmenter.resent)

    with TritonServer(settings_for(tmp_path / "models")) as running:
        threads = [threading.Thread(target=client, args=(running.settings.grpc_url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(resent) == 3
    assert sum(resent) > 0
    assert wrong == []


def header() -> dict[str, object]:
    return {"input": {"sha256": "a"}, "model": "1 b"}


def test_torn_results_are_computed_again(tmp_path: Path) -> None:
    folder = tmp_path / "volume.partial"
    rows = RNG.random((3, 4, 5)).astype(np.float16)
    partial = Partial(folder, header(), resume=False, anew=False)
    store = RawStore(folder / "probability.raw", 4, 5, np.dtype(np.float16))
    for page in range(3):
        partial.keep(store, page, 0, rows[page])
    store.close()
    partial.close(finished=False)
    with (folder / "probability.raw").open("r+b") as stream:
        stream.seek(4 * 5 * 2 + 7)
        stream.write(b"torn")
        stream.truncate(2 * 4 * 5 * 2 + 10)
    with (folder / JOURNAL).open("ab") as stream:
        stream.write(b'{"page": 7, "ro')
    partial = Partial(folder, header(), resume=True, anew=False)
    store = RawStore(folder / "probability.raw", 4, 5, np.dtype(np.float16))
    kept = partial.recall(store, 0, 0, 4)
    assert kept is not None
    np.testing.assert_array_equal(kept, rows[0])
    assert [partial.recall(store, page, 0, 4) for page in (1, 2, 7)] == [None] * 3
    partial.keep(store, 1, 0, rows[1])
    partial.close(finished=False)
    assert Partial(folder, header(), resume=True, anew=False).done.keys() == {(0, 0), (1, 0), (2, 0)}


def test_two_clients_do_not_write_one_output(tmp_path: Path) -> None:
    partial = Partial(tmp_path / "volume.partial", header(), resume=False, anew=False)
    with pytest.raises(ClientError, match="another process is writing"):
        Partial(tmp_path / "volume.partial", header(), resume=True, anew=False)
    partial.close(finished=True)
    assert list(tmp_path.iterdir()) == []


def test_another_input_is_not_continued(url: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = Partial(source.parent / "volume.partial", header(), resume=False, anew=False)
    partial.mark(0, 0, 1)
    partial.close(finished=False)
    assert main([str(source), "--url", url, "--resume"]) == 2
    assert "belongs to another input" in capsys.readouterr().err
    assert main([str(source), "--url", url, "--overwrite", "--quiet"]) == 0
