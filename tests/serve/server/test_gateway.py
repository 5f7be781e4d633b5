"""The gateway's own configuration in a real nginx, in front of a real Triton."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from serve.client import main
from serve.segment.address import Tls
from serve.segment.errors import ClientError
from serve.segment.segmenter import Segmenter
from serve.server.process import TritonServer
from tests.serve.authority import Authority
from tests.serve.server.gateway import TEMPLATE, Gateway, gateway

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None, reason="no nginx was found (Debian: apt-get install nginx-light)"
)
TIMEOUT_S = 20.0
LARGEST = 200_000


@pytest.fixture(scope="module")
def front(triton_server: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with gateway(tmp_path_factory.mktemp("gateway"), triton_server.settings.grpc_url, str(LARGEST)) as running:
        yield running


@pytest.fixture(scope="module")
def client(front: Gateway) -> Iterator[grpc.InferenceServerClient]:
    with connect(front) as connected:
        yield connected


def connect(front: Gateway) -> grpc.InferenceServerClient:
    ca, cert, key = str(front.tls.ca), str(front.tls.cert), str(front.tls.key)
    return grpc.InferenceServerClient(
        front.url, ssl=True, root_certificates=ca, private_key=key, certificate_chain=cert
    )


def tile(side: int) -> grpc.InferInput:
    tensor = grpc.InferInput("image", [1, 1, side, side], "UINT8")
    tensor.set_data_from_numpy(np.full((1, 1, side, side), 255, np.uint8))
    return tensor


def test_the_client_segments_through_it(front: Gateway, triton_server: TritonServer, tmp_path: Path) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (5, 90, 130), np.uint8)
    tifffile.imwrite(tmp_path / "v.tif", stack, photometric="minisblack")
    line = [str(tmp_path / "v.tif"), "--url", front.url, "--quiet", "--tls_ca", str(front.tls.ca)]
    assert main([*line, "--tls_cert", str(front.tls.cert), "--tls_key", str(front.tls.key)]) == 0
    with Segmenter(triton_server.settings.grpc_url) as plain:
        expected = np.stack(list(plain.segment(stack)))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "v-probability.tif"), expected)


@pytest.mark.parametrize(
    "ask",
    [
        lambda client: client.load_model("unet"),
        lambda client: client.unload_model("unet"),
        lambda client: client.get_model_repository_index(),
        lambda client: client.get_inference_statistics("unet"),
        lambda client: client.get_system_shared_memory_status(),
        lambda client: client.register_system_shared_memory("a", "/a", 16),
        lambda client: client.unregister_system_shared_memory(),
        lambda client: client.register_cuda_shared_memory("a", b"eA==", 0, 16),
        lambda client: client.update_trace_settings("unet", {"trace_level": "TIMESTAMPS"}),
        lambda client: client.get_trace_settings("unet"),
        lambda client: client.update_log_settings({"log_info": False}),
    ],
)
def test_other_methods_are_refused(client: grpc.InferenceServerClient, ask: object) -> None:
    with pytest.raises(InferenceServerException, match="the gateway does not admit this method") as refused:
        ask(client)  # type: ignore[operator]
    assert refused.value.status() == "StatusCode.PERMISSION_DENIED"


def test_a_stream_is_refused(client: grpc.InferenceServerClient) -> None:
    answers: list[Exception | None] = []
    client.start_stream(lambda result, error: answers.append(error))
    client.stop_stream()
    assert "does not admit this method" in str(answers[0])


def test_what_is_too_large_is_refused_and_the_rest_goes_on(client: grpc.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="the request is larger than the gateway admits") as refused:
        client.infer("unet", [tile(572)], client_timeout=TIMEOUT_S)
    assert refused.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    answer = client.infer("unet", [tile(204)], client_timeout=TIMEOUT_S)
    assert answer.as_numpy("probability").max() == pytest.approx(1)


@pytest.mark.parametrize("who", ["nobody", "stranger", "plain"])
def test_only_clients_of_the_authority_get_in(front: Gateway, tmp_path: Path, who: str) -> None:
    stranger = Authority(tmp_path / "other").issue("client")
    tls = {"nobody": Tls(front.tls.ca), "stranger": Tls(front.tls.ca, stranger.cert, stranger.key), "plain": None}[who]
    with pytest.raises(ClientError):
        Segmenter(front.url, timeout_s=TIMEOUT_S, patience_s=0, tls=tls)


def test_a_triton_that_is_gone_is_said(tmp_path: Path) -> None:
    with (
        gateway(tmp_path, "127.0.0.1:1") as dead,
        connect(dead) as client,
        pytest.raises(InferenceServerException, match="Triton does not answer the gateway") as refused,
    ):
        client.is_model_ready("unet", client_timeout=TIMEOUT_S)
    assert refused.value.status() == "StatusCode.UNAVAILABLE"


def test_every_method_of_triton_is_either_admitted_or_refused_here() -> None:
    """A method that a newer Triton adds is refused until somebody looks at it."""
    from tritonclient.grpc import service_pb2

    methods = set(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
    text = TEMPLATE.read_text(encoding="utf-8")
    (admitted,) = re.findall(r"GRPCInferenceService/\\?\(([A-Za-z|]+)\)\$", text)
    assert set(admitted.split("|")) < methods
    assert not {
        name for name in admitted.split("|") if re.search("Repository|SharedMemory|Trace|Log|Statistics|Stream", name)
    }
