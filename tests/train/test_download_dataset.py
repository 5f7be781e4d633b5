from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import tifffile

from train.download_dataset import download
from train.errors import TrainError

STACKS = {
    name: np.random.default_rng(number).integers(0, 256, (3, 40, 50), np.uint8)
    for number, name in enumerate(("train-volume.tif", "train-labels.tif", "test-volume.tif"))
}
EXPECTED = {name: hashlib.sha256(stack.tobytes()).hexdigest() for name, stack in STACKS.items()}


def archive_of(stacks: dict[str, np.ndarray]) -> bytes:  # type: ignore[type-arg]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, stack in stacks.items():
            tiff = io.BytesIO()
            tifffile.imwrite(tiff, stack, photometric="minisblack")
            opened.writestr(f"ISBI-2012-challenge/{name}", tiff.getvalue())
            opened.writestr(f"__MACOSX/ISBI-2012-challenge/{name}", b"of no use")
    return packed.getvalue()


ARCHIVE = archive_of(STACKS)


class Mirror:
    """A real HTTP server, and what it does with each request in turn; the last goes on for ever."""

    def __init__(self, *behaviours: str, content: bytes = ARCHIVE) -> None:
        self.ranges: list[str | None] = []
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                behaviour = behaviours[min(len(mirror.ranges), len(behaviours) - 1)]
                wanted = self.headers["Range"]
                mirror.ranges.append(wanted)
                if behaviour == "refuse":
                    self.send_error(503)
                    return
                first = int(wanted[6:-1]) if wanted and behaviour != "without ranges" else 0
                if first >= len(content):
                    self.send_error(416)
                    return
                body = content[first:]
                self.send_response(206 if first else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if behaviour == "break off":
                    body = body[: len(content) // 3]
                if behaviour == "corrupt":
                    body = bytes(len(body))
                self.wfile.write(body)
                self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/ISBI-2012-challenge.zip"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def mirror() -> Iterator[Callable[..., Mirror]]:
    opened: list[Mirror] = []

    def make(*behaviours: str, content: bytes = ARCHIVE) -> Mirror:
        opened.append(Mirror(*behaviours, content=content))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def assert_whole(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(STACKS)
    for name, stack in STACKS.items():
        np.testing.assert_array_equal(tifffile.imread(folder / name), stack)


def test_all_stacks_come_out_of_the_archive(mirror: Callable[..., Mirror], tmp_path: Path) -> None:
    good = mirror("serve")
    assert [path.name for path in download(tmp_path, [good.url], EXPECTED)] == list(STACKS)
    assert_whole(tmp_path)
    assert download(tmp_path, [good.url], EXPECTED) == []
    assert len(good.ranges) == 1


def test_it_goes_on_where_a_mirror_broke_off(mirror: Callable[..., Mirror], tmp_path: Path) -> None:
    third = len(ARCHIVE) // 3
    breaking = mirror("break off", "break off", "serve")
    download(tmp_path, [breaking.url], EXPECTED)
    assert breaking.ranges == [None, f"bytes={third}-", f"bytes={2 * third}-"]
    assert_whole(tmp_path)


def test_a_later_call_goes_on_from_what_has_arrived(mirror: Callable[..., Mirror], tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="503"):
        download(tmp_path, [mirror("break off", "refuse").url], EXPECTED)
    assert [path.name for path in tmp_path.iterdir()] == [".download.zip.part"]
    good = mirror("serve")
    download(tmp_path, [good.url], EXPECTED)
    assert good.ranges == [f"bytes={len(ARCHIVE) // 3}-"]
    assert_whole(tmp_path)


def test_a_mirror_without_ranges_starts_anew(mirror: Callable[..., Mirror], tmp_path: Path) -> None:
    download(tmp_path, [mirror("break off", "without ranges").url], EXPECTED)
    assert_whole(tmp_path)


def test_a_whole_part_needs_no_more(mirror: Callable[..., Mirror], tmp_path: Path) -> None:
    (tmp_path / ".download.zip.part").write_bytes(ARCHIVE)
    download(tmp_path, [mirror("serve").url], EXPECTED)
    assert_whole(tmp_path)


def test_the_next_mirror_is_tried(mirror: Callable[..., Mirror], tmp_path: Path) -> None:
    other = archive_of({**STACKS, "train-labels.tif": STACKS["train-labels.tif"] + 1})
    bad = [mirror("refuse"), mirror("corrupt"), mirror("serve", content=other), mirror("serve", content=b"no archive")]
    download(tmp_path, ["http://127.0.0.1:9/closed.zip", *(one.url for one in bad), mirror("serve").url], EXPECTED)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("behaviour", "sentence"), [("refuse", "503"), ("corrupt", "damaged"), ("break off", "503|breaks off|damaged")]
)
def test_failures_are_one_sentence(
    mirror: Callable[..., Mirror], tmp_path: Path, behaviour: str, sentence: str
) -> None:
    broken = mirror(behaviour, "refuse")
    with pytest.raises(TrainError, match=sentence) as caught:
        download(tmp_path, [broken.url], EXPECTED)
    assert broken.url in str(caught.value)
    assert not list(tmp_path.glob("*.tif"))


def test_a_mirror_may_be_a_file_and_what_is_no_address_is_one_sentence(tmp_path: Path) -> None:
    archive = tmp_path / "ISBI-2012-challenge.zip"
    archive.write_bytes(ARCHIVE)
    (tmp_path / "data").mkdir()
    download(tmp_path / "data", ["ISBI-2012-challenge.zip", archive.as_uri()], EXPECTED)
    assert_whole(tmp_path / "data")
    missing = (tmp_path / "none.zip").as_uri()
    with pytest.raises(TrainError, match=r"x\.zip: it is no address, .*none\.zip: it cannot be reached"):
        download(tmp_path / "other", ["x.zip", missing], EXPECTED)


def test_other_pixels_are_refused(mirror: Callable[..., Mirror], tmp_path: Path) -> None:
    other = archive_of({**STACKS, "test-volume.tif": STACKS["test-volume.tif"][:2]})
    with pytest.raises(TrainError, match=r"test-volume\.tif has other pixels"):
        download(tmp_path, [mirror("serve", content=other).url], EXPECTED)
    assert not (tmp_path / "test-volume.tif").exists()
    tifffile.imwrite(tmp_path / "test-volume.tif", STACKS["test-volume.tif"][:2], photometric="minisblack")
    with pytest.raises(TrainError, match="move it away"):
        download(tmp_path, [mirror("serve").url], EXPECTED)


def test_the_command_with_the_real_slices(
    mirror: Callable[..., Mirror], isbi_dir: Path, tmp_path: Path, project_root: Path
) -> None:
    real = mirror("break off", "serve", content=archive_of({name: tifffile.imread(isbi_dir / name) for name in STACKS}))
    line = [sys.executable, str(project_root / "train" / "download_dataset.py"), "--data_dir", str(tmp_path / "data")]
    done = subprocess.run([*line, "--mirror", real.url], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sha256") == 3
    assert done.stderr == ""
    done = subprocess.run([*line, "--mirror", "http://127.0.0.1:9/"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "already, and whole" in done.stdout
