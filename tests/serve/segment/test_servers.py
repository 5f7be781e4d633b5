"""Addresses, proxies, the table of faults, and several servers that share the load."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve import ClientError, Segmenter, ServerError
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.address import Address
from serve.segment.connection import Connection
from serve.segment.errors import RULES, Action, rule_for
from serve.segment.settings import Settings
from serve.segment.slot import Slot
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings

RNG = np.random.default_rng(12)


@pytest.fixture
def url(triton_server: TritonServer) -> str:
    return triton_server.settings.grpc_url


@pytest.fixture
def server(tiny_artefacts: Path, settings_for: Callable[..., ServerSettings], tmp_path: Path) -> Iterator[TritonServer]:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models")) as running:
        yield running


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("gpu1:8001", "gpu1", 8001),
        ("GPU1:8001", "gpu1", 8001),
        ("grpc://gpu1:8001", "gpu1", 8001),
        ("http://gpu1:8001/", "gpu1", 8001),
        ("[::1]:8001", "::1", 8001),
        (" 10.0.0.7:1 ", "10.0.0.7", 1),
    ],
)
def test_addresses(text: str, host: str, port: int) -> None:
    assert (Address.parse(text).host, Address.parse(text).port) == (host, port)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("   ", "is empty"),
        ("gpu1", r"has no valid port: add that of the server's gRPC, as in gpu1:8001"),
        ("gpu1:0", "has no valid port"),
        ("gpu1:99999", "has no valid port"),
        ("::1:8001", "is not HOST:PORT"),
        ("gpu1:8001/v2", "is not HOST:PORT"),
        ("ftp://gpu1:8001", "begins with ftp://"),
        ("https://gpu1:8001", "asks for an encrypted connection: name the server's authority with --tls_ca"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(ClientError, match=words):
        Segmenter(text)


def test_two_servers_of_one_host_are_two_and_two_spellings_are_one() -> None:
    assert Settings.of(("gpu1:8001", "gpu1:8011", "http://GPU1:8001"), {}).urls == ("gpu1:8001", "gpu1:8011")


def test_the_port_of_http_is_told_from_that_of_grpc(triton_server: TritonServer) -> None:
    settings = triton_server.settings
    with pytest.raises(ClientError, match="speaks HTTP; give the port of the server's gRPC"):
        Segmenter(f"127.0.0.1:{settings.http_port}")


@pytest.mark.parametrize("name", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_server_on_this_machine_is_reached_without_the_proxy(
    url: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Segmenter(url) as segmenter:
        assert segmenter.interface.version == "1"
    # TEST-NET-1 belongs to nobody.
    with pytest.raises(ServerError, match=rf"the proxy .*{name}=http://127.0.0.1:9.*add 192.0.2.1 to no_proxy"):
        Segmenter("192.0.2.1:8001", timeout_s=2)
    monkeypatch.setenv("no_proxy", "example.org, 192.0.2.1")
    assert Address.parse("192.0.2.1:8001").proxy is None


def test_a_message_of_more_than_2_gib_is_refused_before_it_is_sent(url: str) -> None:
    connection = Connection(url, "unet", "", 5.0)
    with pytest.raises(ClientError, match=r"60 tiles of 6012 x 6012 .* 2 GiB .* lower the batch size to 31"):
        Slot(connection, (60, 1, 6012, 6012))
    with pytest.raises(ClientError, match="serve smaller tile sizes"):
        Slot(connection, (1, 1, 46332, 46332))
    connection.close()


# What Triton 2.50 and gRPC say.
@pytest.mark.parametrize(
    ("code", "message", "action"),
    [
        ("DEADLINE_EXCEEDED", "Deadline Exceeded", Action.LEAVE),
        ("UNAVAILABLE", "[request id: <id_unknown>] Exceeds maximum queue size", Action.WAIT),
        ("UNAVAILABLE", "Request timeout expired", Action.WAIT),
        ("UNAVAILABLE", "failed to connect to all addresses; last error: Connection refused", Action.REOPEN),
        ("UNAVAILABLE", "Socket closed", Action.REOPEN),
        ("UNAVAILABLE", "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", Action.STOP),
        ("NOT_FOUND", "Request for unknown model: 'unet' version 7 is not found", Action.REOPEN),
        ("NOT_FOUND", "Unable to find shared memory region: 'nope'", Action.REOPEN),
        ("INVALID_ARGUMENT", "Unable to find system shared memory region: 'nope'", Action.REOPEN),
        (
            "INTERNAL",
            "Failed to increase the shared memory pool size for key 'x' to 67108864 bytes. If you are running Triton "
            "inside docker, use '--shm-size' flag to control the shared memory region size. Error: No space left",
            Action.SEND_PIXELS,
        ),
        ("INTERNAL", "Stub process 'unet_0_0' is not healthy.", Action.LEAVE),
        ("INTERNAL", "Failed to process the request(s) for model 'unet_0_0', message: MemoryError: ", Action.LEAVE),
        ("INTERNAL", "something else", Action.LEAVE),
        ("UNKNOWN", "", Action.LEAVE),
        ("ABORTED", "", Action.LEAVE),
        ("CANCELLED", "", Action.LEAVE),
        ("DATA_LOSS", "", Action.LEAVE),
        ("RESOURCE_EXHAUSTED", "CLIENT: Sent message larger than max (2162250038 vs. 2147483647)", Action.STOP),
        ("RESOURCE_EXHAUSTED", "no quota", Action.LEAVE),
        ("UNIMPLEMENTED", "", Action.STOP),
        ("INVALID_ARGUMENT", "unexpected inference input 'x' for model 'unet'", Action.STOP),
        ("NOT_FOUND", "no such thing", Action.STOP),
        ("ALREADY_EXISTS", "", Action.STOP),
        ("PERMISSION_DENIED", "", Action.STOP),
        ("UNAUTHENTICATED", "", Action.STOP),
        ("FAILED_PRECONDITION", "", Action.STOP),
        ("OUT_OF_RANGE", "", Action.STOP),
    ],
)
def test_every_code_of_grpc_has_its_action(code: str, message: str, action: Action) -> None:
    assert rule_for(code, message).action is action


def test_the_page_shows_the_table(project_root: Path) -> None:
    page = (project_root / "docs" / "client.md").read_text(encoding="utf-8")
    for rule in RULES:
        codes = ", ".join(f"`{code}`" for code in rule.codes) or "any other"
        words = rule.words.replace("|", "\\|")
        cells = f"{codes} | {f'`{words}`' if words else ''} | {rule.action.value} |"
        assert cells in page, cells


def answered(url: str) -> int:
    import tritonclient.grpc as grpc

    with grpc.InferenceServerClient(url) as client:
        [stats] = client.get_inference_statistics("unet").model_stats
        return int(stats.inference_stats.success.count)


def test_several_servers_share_the_load(url: str, server: TritonServer) -> None:
    images = [RNG.integers(0, 256, (60, 70), np.uint8) for _ in range(300)]
    urls = (url, server.settings.grpc_url)
    before = [answered(each) for each in urls]
    with Segmenter(urls) as segmenter:
        for image, answer in zip(images, segmenter.segment(images)):
            np.testing.assert_array_equal(answer, (image.astype(np.float16) * np.float16(1 / 255)).astype(np.float32))
        assert segmenter.resent == 0
    shares = [after - former for after, former in zip([answered(each) for each in urls], before)]
    assert sum(shares) == 2 * 300
    assert min(shares) > 30


def test_a_server_that_hangs_costs_one_timeout(
    url: str, server: TritonServer, caplog: pytest.LogCaptureFixture
) -> None:
    images = [RNG.integers(0, 256, (60, 70), np.uint8) for _ in range(40)]
    with Segmenter((server.settings.grpc_url, url), timeout_s=3, in_flight=2) as segmenter:
        answers = segmenter.segment(images)
        found = [next(answers)]
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            found.extend(answers)
            taken_s = time.monotonic() - started
        finally:
            os.kill(server.pid, signal.SIGCONT)
    for image, answer in zip(images, found):
        np.testing.assert_array_equal(answer, (image.astype(np.float16) * np.float16(1 / 255)).astype(np.float32))
    assert taken_s < 3 + 2
    assert "gave no answer in 3 s" in caplog.text
    assert "the other servers go on" in caplog.text


def test_a_spare_server_that_is_down_is_said_and_the_others_work(
    url: str, caplog: pytest.LogCaptureFixture, free_port: int
) -> None:
    image = RNG.integers(0, 256, (60, 70), np.uint8)
    down = f"127.0.0.1:{free_port}"
    for urls in ((down, url), (url, down)):
        with Segmenter(urls) as segmenter:
            for _ in range(20):
                segmenter.segment_slice(image)
        assert f"no server answers at {down}" in caplog.text
        assert "the other servers do the work" in caplog.text
        caplog.clear()


@pytest.fixture
def free_port() -> int:
    from unet.processes import free_ports

    return free_ports(1)[0]


def test_the_server_that_lacks_room_in_dev_shm_gets_pixels(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton says when the pool of its python backend cannot grow beside the regions of its clients."""
    from tritonclient.utils import InferenceServerException

    image = RNG.integers(0, 256, (60, 70), np.uint8)
    said: list[Any] = []
    infer_async = Connection.infer_async

    def failing(self: Connection, inputs: Any, outputs: Any, receive: Any) -> Any:
        if inputs[0]._get_content() is None:
            said.append(inputs)
            receive(None, InferenceServerException("use '--shm-size' flag to", status="StatusCode.INTERNAL"))
            return None
        return infer_async(self, inputs, outputs, receive)

    monkeypatch.setattr(Connection, "infer_async", failing)
    with Segmenter(url, shared_memory="auto") as segmenter:
        answer = segmenter.segment_slice(image)
    np.testing.assert_array_equal(answer, (image.astype(np.float16) * np.float16(1 / 255)).astype(np.float32))
    assert said
