"""The page of a volume and its results, asked by a real browser and by those who should get nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from serve.client import main as client_main
from serve.segment.errors import ClientError
from serve.server.process import TritonServer
from serve.volume.view.__main__ import main
from serve.volume.view.layers import MAX_SIDE_PX, Layers, kind_of
from serve.volume.view.server import ViewServer
from tests.serve.measure.browser import Browser, browser

SHAPE = (3, 20, 30)
IMAGES = (np.arange(np.prod(SHAPE)).reshape(SHAPE) % 200).astype(np.uint8)
# Not above 0.2 in the first column, not above 0.6 in the second one too.
FOUND = np.full(SHAPE, 0.9, np.float32)
FOUND[:, :, 0], FOUND[:, :, 1] = 0.2, 0.6
LABELS = np.zeros(SHAPE, np.uint16)
LABELS[:, 5:, 5:15], LABELS[:, 5:, 16:] = 1, 2
RED = [255, 64, 32]


def write(path: Path, pixels: np.ndarray[Any, Any], **tags: Any) -> Path:
    tifffile.imwrite(path, pixels, photometric="minisblack", **tags)
    return path


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    made_by = "unet-medical-triton 1; threshold 0.4; intensity window as they are"
    write(tmp_path / "v-probability.tif", FOUND, software=made_by, metadata=None)
    write(tmp_path / "v-labels.tif", LABELS)
    write(tmp_path / "v-mask.tif", ((FOUND > 0.4) * 255).astype(np.uint8))
    return write(
        tmp_path / "v.tif", IMAGES, imagej=True, resolution=(1 / 4, 1 / 4), metadata={"unit": "nm", "axes": "ZYX"}
    )


@contextlib.contextmanager
def served(layers: Layers) -> Iterator[ViewServer]:
    with layers, ViewServer(layers) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: ViewServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    with contextlib.closing(connection):
        connection.putrequest(method, path, skip_host="host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())


def pixel(page: Browser, row: int, column: int) -> list[int]:
    """What the canvas shows there."""
    context = "document.getElementById('view').getContext('2d')"
    found: list[int] = page.run(f"return [...{context}.getImageData({column}, {row}, 1, 1).data.slice(0, 3)]")
    return found


def wait_for(page: Browser, slice_: int, layer: int) -> None:
    page.run(
        "const data = document.getElementById('view').dataset;"
        f"while (data.slice !== '{slice_}' || data.layer !== '{layer}') await new Promise(requestAnimationFrame);"
    )


def move(page: Browser, control: str, value: float | str, event: str = "input") -> None:
    page.run(
        f"const control = document.getElementById('{control}'); control.value = '{value}';"
        f"control.dispatchEvent(new Event('{event}'));"
    )


def mixed(grey: int, share: float = 0.5) -> list[int]:
    return [int(np.floor(grey + (colour - grey) * share + 0.5)) for colour in RED]


def grey(page: int, row: int, column: int) -> list[int]:
    return [int(IMAGES[page, row, column])] * 3


def test_a_browser_shows_slices_with_what_was_found(volume: Path, tmp_path: Path) -> None:
    with served(Layers(volume)) as server, browser(tmp_path / "profile") as page:
        page.open(server.url)
        wait_for(page, 0, 1)
        # The threshold is the one that the client cut at.
        assert page.run("return document.getElementById('threshold').value") == "0.4"
        assert pixel(page, 3, 0) == mixed(int(IMAGES[0, 3, 0]))
        assert pixel(page, 3, 1) == grey(0, 3, 1)
        move(page, "threshold", 0.7)
        assert pixel(page, 3, 1) == mixed(int(IMAGES[0, 3, 1]))
        assert pixel(page, 3, 2) == grey(0, 3, 2)
        # What is just at the threshold is not above it, as in the client.
        move(page, "threshold", 0.6)
        assert pixel(page, 3, 1) == mixed(int(IMAGES[0, 3, 1]))
        move(page, "threshold", 0.59)
        assert pixel(page, 3, 1) == grey(0, 3, 1)
        move(page, "threshold", 0.7)
        move(page, "opacity", 1)
        assert pixel(page, 3, 0) == RED
        move(page, "opacity", 0)
        assert pixel(page, 3, 0) == grey(0, 3, 0)
        move(page, "opacity", 1)
        move(page, "slice", 2)
        wait_for(page, 2, 1)
        assert pixel(page, 19, 29) == grey(2, 19, 29)
        page.run("document.getElementById('view').focus()")
        for key, shown in (("ArrowLeft", 1), ("ArrowRight", 2), ("ArrowRight", 2)):
            event = f"new KeyboardEvent('keydown', {{key: '{key}', bubbles: true}})"
            page.run(f"document.getElementById('view').dispatchEvent({event})")
            wait_for(page, shown, 1)
            assert pixel(page, 7, 7) == grey(shown, 7, 7)
        # Labels: two colours, and none where there is no cell.
        move(page, "layer", 3, "change")
        wait_for(page, 2, 3)
        first, second = pixel(page, 6, 6), pixel(page, 6, 20)
        assert first != second
        assert pixel(page, 19, 14) == first
        assert pixel(page, 6, 15) == grey(2, 6, 15)
        assert page.run("return document.getElementById('threshold').disabled")
        move(page, "layer", 2, "change")
        wait_for(page, 2, 2)
        assert [pixel(page, 3, column) for column in (0, 1)] == [RED, grey(2, 3, 1)]
        # 30 pixels of 4 nm, of which a quarter holds 20 nm.
        assert page.run("return document.getElementById('bar').textContent") == "20 nm"
        asked = page.run("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert len(asked) > 8
        assert all(one.startswith(server.url) for one in asked)
        assert page.errors == []


def test_a_slice_that_cannot_be_read_is_said_on_the_page(volume: Path, tmp_path: Path) -> None:
    layers = Layers(volume, [])
    with served(layers) as server, browser(tmp_path / "profile") as page:
        page.open(server.url)
        wait_for(page, 0, 0)
        layers.close()
        move(page, "slice", 2)
        page.run("while (document.getElementById('fault').hidden) await new Promise(requestAnimationFrame)")
        assert "slice 2 cannot be shown" in page.run("return document.getElementById('fault').textContent")


def test_planes_are_what_the_files_hold(volume: Path) -> None:
    with served(Layers(volume)) as server:
        about = json.loads(ask(server, "/about.json")[1])
        assert (about["slices"], about["height"], about["width"], about["step"]) == (*SHAPE, 1)
        assert about["pixel_nm"] == pytest.approx(4.0)
        kinds = [(one["kind"], one["name"], one["type"], one["threshold"]) for one in about["layers"]]
        assert kinds == [
            ("image", "v.tif", "uint8", None),
            ("probability", "v-probability.tif", "float32", 0.4),
            ("mask", "v-mask.tif", "uint8", None),
            ("labels", "v-labels.tif", "uint32", None),
        ]
        due: list[tuple[Any, str]] = [(IMAGES, "u1"), (FOUND, "<f4"), (FOUND > 0.4, "u1"), (LABELS, "<u4")]
        for layer, (expected, dtype) in enumerate(due):
            status, body, headers = ask(server, f"/plane/{layer}/1")
            assert status == 200
            np.testing.assert_array_equal(np.frombuffer(body, dtype).reshape(SHAPE[1:]), expected[1])
            assert headers["Cache-Control"] == "no-store"
            assert headers["Content-Security-Policy"].startswith("default-src 'none'")


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/plane/0/3", 404),
        ("/plane/4/0", 404),
        ("/plane/0/-1", 404),
        ("/plane/0/0/", 404),
        ("/plane/0/٣", 404),
        ("/../pyproject.toml", 404),
        ("/%2e%2e/%2e%2e/etc/passwd", 404),
        ("//etc/passwd", 404),
        ("/view.js?x", 404),
        ("http://elsewhere/", 404),
    ],
)
def test_nothing_but_slices_is_served(volume: Path, path: str, status: int) -> None:
    with served(Layers(volume)) as server:
        line = f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.server_port}\r\nConnection: close\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.server_port), 20) as asking:
            asking.sendall(line.encode())
            answer = b"".join(iter(lambda: asking.recv(1 << 16), b""))
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"root:" not in answer
        assert ask(server, "/")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_pages_elsewhere_get_nothing(volume: Path, headers: dict[str, str], status: int) -> None:
    with served(Layers(volume)) as server:
        found, body, _ = ask(server, "/plane/0/0", **headers)
        assert found == status
        assert b"on this machine only" in body
        assert ask(server, "/about.json", host=f"localhost:{server.server_port}")[0] == 200
        assert ask(server, "/about.json", Origin=server.url.rstrip("/"))[0] == 200
        assert ask(server, "/about.json", method="POST")[0] == 501
        # No other interface listens.
        with socket.socket() as other:
            other.settimeout(5)
            assert other.connect_ex(("127.0.0.2", server.server_port)) != 0


def test_other_types_and_large_slices_are_made_to_fit_a_screen(tmp_path: Path) -> None:
    wide = np.zeros((2, 8, 2 * MAX_SIDE_PX + 1), np.uint16)
    wide[1] = np.linspace(1000, 3000, wide.shape[2]).astype(np.uint16)
    with Layers(write(tmp_path / "w.tif", wide), []) as layers:
        assert layers.step == 3
        assert not layers.plane(0, 0).any()
        shown = layers.plane(0, 1)
        assert shown.shape == (3, 1366)
        assert shown.dtype == np.uint8
        assert (shown[0, 0], shown[0, -1]) == (0, 255)
        assert abs(int(shown[0, 683]) - 127) <= 1
    mean = np.full((1, 4, 4), 2.5, np.float32)
    mean[0, 0] = np.nan
    mean[0, 1] = 7.5
    with Layers(write(tmp_path / "f.tif", mean), []) as layers:
        np.testing.assert_array_equal(layers.plane(0, 0)[:, 0], [0, 255, 0, 0])


def test_results_of_another_volume_are_refused(volume: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write(volume.with_name("w-mask.tif"), np.zeros((3, 20, 31), np.uint8))
    assert main([str(volume), str(other)]) == 2
    said = capsys.readouterr().err
    assert f"{other} has 3 slices of 20 x 31, and {volume} has 3 slices of 20 x 30: name results of this volume" in said
    assert main([str(volume), str(volume)]) == 2
    assert "is not named as the client names its results" in capsys.readouterr().err
    assert main([str(volume.with_name("none.tif"))]) == 2
    assert "none.tif" in capsys.readouterr().err
    assert kind_of(Path("a-mask-labels3d.zarr")) == "labels3d"


def test_a_port_that_is_taken_or_is_none_is_said(volume: Path) -> None:
    with Layers(volume) as layers, ViewServer(layers) as server:
        with pytest.raises(ClientError, match=f"^port {server.server_port} is taken: choose another one"):
            ViewServer(layers, server.server_port)
        with pytest.raises(ClientError, match="--port is 65536; it must be from 0 to 65535"):
            ViewServer(layers, 65536)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_it(volume: Path, number: signal.Signals) -> None:
    line = [sys.executable, "-m", "serve.volume.view", str(volume)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        found = re.match(r"http://127\.0\.0\.1:(\d+)/ shows it", process.stdout.readline())
        assert found is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/")
            assert connection.getresponse().status == 200
        process.send_signal(number)
        assert process.wait(20) == (0 if number == signal.SIGINT else 128 + signal.SIGTERM)
        assert process.stderr.read() == ""


def test_the_client_shows_what_it_found(
    triton_server: TritonServer, volume: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        str(volume),
        "--url",
        triton_server.settings.grpc_url,
        "--output_dir",
        str(tmp_path / "a b"),
        "--output",
        "mask",
    ]
    assert client_main(line) == 0
    said = capsys.readouterr().out
    made = tmp_path / "a b" / "v-mask.tif"
    assert f"python -m serve.volume.view {volume} --output_dir '{made.parent}', or napari {volume} '{made}'" in said
    assert client_main([str(volume), *line, "--view"]) == 2
    assert "--view shows what was found in one volume" in capsys.readouterr().err
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    words = [sys.executable, "serve/client.py", *line, "--resume", "--view"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        urls = (re.search(r"http://127\.0\.0\.1:(\d+)/ shows it", row) for row in process.stdout)
        port = next(found for found in urls if found)[1]
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=20)
        with contextlib.closing(connection):
            connection.request("GET", "/about.json")
            layers = json.loads(connection.getresponse().read())["layers"]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert [one["kind"] for one in layers] == ["image", "mask"]
