from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve.client import ClientError, Segmenter, main
from serve.slots import remove_dead_segments
from serve.triton import TritonServer

SHARED_MEMORY = Path("/dev/shm")
RNG = np.random.default_rng(0)


def our_segments() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob("unet-client-*")}


def expected(image: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """What the test's network answers: the intensity as a float16 share of 255."""
    return (image.astype(np.float16) * np.float16(1 / 255)).astype(np.float32)


@pytest.fixture(scope="session")
def url(triton_server: TritonServer) -> str:
    return triton_server.settings.grpc_url


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
        assert segmenter.uses_shared_memory == (shared_memory == "on")
    assert len(answers) == len(images)
    for image, answer in zip(images, answers):
        assert answer.dtype == np.float32
        np.testing.assert_array_equal(answer, expected(image))
    assert our_segments() == set()


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
        assert segmenter.tile_sizes == (204, 252)
        assert segmenter.max_batch_size == 8


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


def test_a_deadline_is_a_sentence(url: str) -> None:
    with Segmenter(url, timeout_s=20) as segmenter:
        segmenter._timeout_s = 1e-6
        with pytest.raises(ClientError, match="gave no answer in 1e-06 s"):
            segmenter.segment_slice(np.zeros((60, 60), np.uint8))
        segmenter._timeout_s = 20


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
    ],
)
def test_faults_are_one_sentence_and_leave_nothing(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    source = tmp_path / "volume.tif"
    tifffile.imwrite(source, np.zeros((2, 20, 20), np.uint8), photometric="minisblack")
    assert main([str(source), "--url", url, "--timeout_s", "5", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert sentence in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["volume.tif"]
    assert our_segments() == set()


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_client_leaves_no_shared_memory(url: str, tmp_path: Path, number: int) -> None:
    code = (
        "import sys, numpy as np; from serve.client import Segmenter; from unet.errors import command\n"
        "@command\n"
        "def main(argv=None):\n"
        "    with Segmenter(sys.argv[1], shared_memory='on') as segmenter:\n"
        "        for _ in segmenter.segment(np.zeros((60, 60), np.uint8) for _ in range(10**9)):\n"
        "            print('going', flush=True)\n"
        "sys.exit(main())\n"
    )
    line = [sys.executable, "-c", code, url]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        assert our_segments() != set()
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else 143)
    assert our_segments() == set()


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
