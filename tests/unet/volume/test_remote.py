"""Zarr volumes on a web server, in S3 and in Google's store, each a real server on this machine."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.unet.volume.test_formats import SIZE_NM, STACK, ngff, ngff_05_sharded, pixels_of, plain_zarr
from unet.volume import StackError, open_volume
from unet.volume.opening import beside

aiohttp = pytest.importorskip("aiohttp")
fsspec = pytest.importorskip("fsspec")
pytest.importorskip("zarr", minversion="3")

Array = npt.NDArray[Any]
KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


def ngff_04(folder: Path, pixels: Array) -> Path:
    """Few chunks: each is a request."""
    return ngff(folder, pixels, "0.4", chunks=(3, 40, 50))


class Ranges(SimpleHTTPRequestHandler):
    """Gives parts of files, as object stores do; shards are read so."""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        file = Path(self.translate_path(self.path))
        if not wanted or not file.is_file():
            super().do_GET()
            return
        content = file.read_bytes()
        first, _, last = wanted.partition("-")
        part = content[int(first) : int(last) + 1 if last else None] if first else content[-int(last) :]
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address of a web server that gives the files of the test's folder."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket in an S3 server on this machine."""
    settings = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3_port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        **dict.fromkeys(KEYS, "anything"),
    }
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    store = fresh("s3")
    bucket = f"bucket-{os.urandom(4).hex()}"
    store.mkdir(bucket)
    yield f"s3://{bucket}"
    fresh("s3")


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty bucket in an emulator of Google's store on this machine."""
    pytest.importorskip("gcsfs")
    server = pytest.importorskip("gcp_storage_emulator.server").create_server(
        "127.0.0.1", 0, in_memory=True, default_bucket="bucket"
    )
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server._api._httpd.server_port}")
    fresh("gs")
    yield "gs://bucket"
    server.stop()


def fresh(scheme: str) -> Any:
    """A client that knows the settings of now."""
    client = fsspec.get_filesystem_class(scheme)
    client.clear_instance_cache()
    return client()


@pytest.mark.parametrize(
    ("store", "make"),
    [
        ("web", ngff_04),
        ("web", ngff_05_sharded),
        ("s3", ngff_04),
        ("s3", ngff_05_sharded),
        ("gs", ngff_04),  # the emulator gives no ends of objects, which shards need
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_volume_elsewhere_is_read_and_its_change_noticed(
    store: str,
    make: Callable[[Path, Array], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    place = request.getfixturevalue(store)
    folder = make(tmp_path, STACK)
    if store != "web":
        fresh(store).put(str(folder), f"{place}/v.zarr", recursive=True)
    monkeypatch.chdir(tmp_path)
    chunk = next(
        file for file in sorted((folder / "s0").rglob("*")) if file.is_file() and file.name[0] in "c0123456789"
    )
    with open_volume(f"{place}/v.zarr") as volume:
        before = volume.fingerprint()
        assert np.array_equal(pixels_of(volume), STACK)
        assert volume.metadata.pixel_size_nm == pytest.approx(SIZE_NM)
        assert not volume.changed()
        assert beside(volume.path) == (tmp_path, "v.zarr")
        if store == "web":
            chunk.write_bytes(chunk.read_bytes() + b"\0")
        else:  # of the same size
            name = f"{place}/v.zarr/{chunk.relative_to(folder).as_posix()}"
            fresh(store).pipe_file(name, chunk.read_bytes()[::-1])
        assert volume.changed()
    with open_volume(f"{place}/v.zarr") as volume:
        assert volume.fingerprint() != before


def test_an_added_and_a_removed_object_are_noticed(s3: str, tmp_path: Path) -> None:
    fresh("s3").put(str(ngff_04(tmp_path, STACK)), f"{s3}/v.zarr", recursive=True)
    chunk = f"{s3}/v.zarr/s0/0.0.0"
    for content in (None, b"new"):
        with open_volume(f"{s3}/v.zarr") as volume:
            volume.fingerprint()
            if content is None:
                fresh("s3").rm(chunk)
            else:
                fresh("s3").pipe_file(chunk, content)
            assert volume.changed()


def test_a_place_in_a_store_is_named_by_its_address(s3: str, tmp_path: Path) -> None:
    plain_zarr(tmp_path, STACK)
    fresh("s3").put(str(tmp_path / "v.zarr"), f"{s3}/v.zarr", recursive=True)
    with pytest.raises(StackError, match=rf"name its place, as in {s3}/v.zarr/PLACE$"):
        open_volume(f"{s3}/v.zarr")
    with open_volume(f"{s3}/v.zarr/volumes/raw") as volume:
        assert np.array_equal(pixels_of(volume), STACK)


@pytest.mark.parametrize("store", ["web", "s3", "gs"])
def test_a_wrong_address_is_one_sentence(
    store: str, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    place = request.getfixturevalue(store)
    capfd.readouterr()
    with pytest.raises(StackError) as caught:
        open_volume(f"{place}/w.zarr")
    said = str(caught.value)
    assert said.startswith(f"{place}/w.zarr is not a Zarr image that can be read (")
    assert said.endswith("): check the address")
    assert "\n" not in said
    assert "Traceback" not in capfd.readouterr().err


def test_a_bucket_that_is_not_there_and_missing_keys(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StackError, match=r"^s3://no-such-bucket/v.zarr is not .*bucket does not exist.*check the addr"):
        open_volume("s3://no-such-bucket/v.zarr")
    for key in KEYS:
        monkeypatch.delenv(key)
    fresh("s3")
    with pytest.raises(
        StackError,
        match=r"v.zarr may not be read \(Unable to locate credentials\): set AWS_PROFILE, or .*_S3_ANON=true$",
    ):
        open_volume(f"{s3}/v.zarr")


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_store_that_does_not_answer(scheme: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as closed:
        port = closed.server_port
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    fresh("s3")
    address = f"{s3}/v.zarr" if scheme == "s3" else f"http://127.0.0.1:{port}/v.zarr"
    with pytest.raises(StackError, match=r"v.zarr cannot be reached \(.*\): check the address and the network"):
        open_volume(address)


def test_a_store_that_fails_later_is_not_called_damage(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ngff_04(tmp_path, STACK)
    with open_volume(f"{web}/v.zarr") as volume:
        volume.fingerprint()
        monkeypatch.setattr(Ranges, "do_GET", lambda self: self.send_error(503))
        monkeypatch.setattr(Ranges, "do_HEAD", lambda self: self.send_error(503))
        with pytest.raises(StackError, match=r"v.zarr cannot be reached \(503"):
            volume[0]
        with pytest.raises(StackError, match=r"v.zarr/s0 cannot be reached \("):
            volume.changed()


def test_a_damaged_chunk_in_a_store_is_named(s3: str, tmp_path: Path) -> None:
    fresh("s3").put(str(ngff_04(tmp_path, STACK)), f"{s3}/v.zarr", recursive=True)
    fresh("s3").pipe_file(f"{s3}/v.zarr/s0/1.0.0", b"no chunk")
    with open_volume(f"{s3}/v.zarr") as volume:
        assert np.array_equal(volume[2], STACK[2])
        with pytest.raises(StackError, match=r"slice 3 of .*v.zarr is damaged \(.*\): copy it again"):
            volume[3]


@pytest.mark.parametrize(
    ("address", "package", "extra"),
    [
        ("s3://bucket/v.zarr", "s3fs", "s3"),
        ("gs://bucket/v.zarr", "gcsfs", "gs"),
        ("https://localhost/v.zarr", "aiohttp", "http"),
    ],
)
def test_each_store_names_its_extra(address: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sentence = rf"^{package} is not installed: pip install 'unet-medical-triton\[{extra}\]'$"
    with pytest.raises(StackError, match=sentence):
        open_volume(address)
