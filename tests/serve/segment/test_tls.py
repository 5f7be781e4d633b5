from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from cryptography.hazmat.primitives import serialization

from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.address import Tls
from serve.segment.errors import ClientError
from serve.segment.segmenter import Segmenter
from serve.server.control import control_of
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.serve.authority import Authority, Pair
from unet.processes import free_ports

TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Secured:
    """A server that admits only clients of its authority."""

    server: TritonServer
    authority: Authority
    stranger: Pair


@pytest.fixture(scope="module")
def secured(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("tls")
    authority, other = Authority(folder / "ours"), Authority(folder / "other")
    pair = authority.issue("server")
    publish(tiny_artefacts, folder / "models", ModelSettings())
    http, grpc, metrics = free_ports(3)
    settings = ServerSettings(
        folder / "models",
        folder / "log",
        folder / "state",
        http,
        grpc,
        metrics,
        model_control="explicit",
        tls_cert=pair.cert,
        tls_key=pair.key,
        tls_client_ca=authority.cert,
    )
    with TritonServer(settings) as server:
        yield Secured(server, authority, other.issue("client"))


def connect(secured: Secured, pair: Pair | None, authority: Path | None = None) -> Any:
    from tritonclient import grpc

    return grpc.InferenceServerClient(
        secured.server.settings.grpc_url,
        ssl=True,
        root_certificates=str(authority or secured.authority.cert),
        private_key=str(pair.key) if pair else None,
        certificate_chain=str(pair.cert) if pair else None,
    )


def test_a_client_of_the_authority_is_served(secured: Secured) -> None:
    from tritonclient import grpc

    tensor = grpc.InferInput("image", [1, 1, 204, 204], "UINT8")
    tensor.set_data_from_numpy(np.full((1, 1, 204, 204), 255, np.uint8))
    with connect(secured, secured.authority.issue("client")) as client:
        answer = client.infer("unet", [tensor], client_timeout=TIMEOUT_S)
    assert answer.as_numpy("probability").max() == pytest.approx(1)


@pytest.mark.parametrize("who", ["nobody", "stranger", "wrong server", "plain"])
def test_anyone_else_is_refused(secured: Secured, who: str, tmp_path: Path) -> None:
    from tritonclient import grpc
    from tritonclient.utils import InferenceServerException

    if who == "plain":
        client = grpc.InferenceServerClient(secured.server.settings.grpc_url)
    elif who == "wrong server":
        client = connect(secured, secured.authority.issue("client"), Authority(tmp_path / "third").cert)
    else:
        client = connect(secured, secured.stranger if who == "stranger" else None)
    with client, pytest.raises(InferenceServerException, match="UNAVAILABLE"):
        client.get_model_config("unet", client_timeout=TIMEOUT_S)


def tls_of(secured: Secured, pair: Pair | None, authority: Path | None = None) -> Tls:
    return Tls(authority or secured.authority.cert, pair.cert if pair else None, pair.key if pair else None)


@pytest.mark.parametrize("shared_memory", ["on", "off"])
def test_our_client_segments_over_tls(
    secured: Secured, triton_server: TritonServer, tmp_path: Path, shared_memory: str
) -> None:
    stack = np.random.default_rng(0).integers(0, 256, (3, 90, 130), np.uint8)
    tifffile.imwrite(tmp_path / "volume.tif", stack, photometric="minisblack")
    pair = secured.authority.issue("client")
    line = [str(tmp_path / "volume.tif"), "--url", secured.server.settings.grpc_url, "--quiet", "--overwrite"]
    line += ["--tls_ca", str(secured.authority.cert), "--tls_cert", str(pair.cert), "--tls_key", str(pair.key)]
    assert main([*line, "--shared_memory", shared_memory]) == 0
    with Segmenter(triton_server.settings.grpc_url) as plain:
        expected = np.stack(list(plain.segment(stack)))
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "volume-probability.tif"), expected)


@pytest.mark.parametrize(("who", "words"), [
    ("nobody", "wants a certificate"), ("stranger", "wants a certificate"),
    ("wrong server", r"CERTIFICATE_VERIFY_FAILED.*--tls_ca"), ("plain", "needs --tls_ca"),
])  # fmt: skip
def test_our_client_says_why_it_is_refused(secured: Secured, who: str, words: str, tmp_path: Path) -> None:
    url, tls = secured.server.settings.grpc_url, None
    if who == "wrong server":
        tls = tls_of(secured, secured.authority.issue("client"), Authority(tmp_path / "third").cert)
    elif who != "plain":
        tls = tls_of(secured, secured.stranger if who == "stranger" else None)
    with pytest.raises(ClientError, match=words):
        Segmenter(url, timeout_s=TIMEOUT_S, tls=tls)


def locked(key: Path) -> bytes:
    """A private key under a password."""
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    return loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


@pytest.mark.parametrize(("flags", "words"), [
    (["--tls_ca", "gone.pem"], "gone.pem cannot be read: No such file"),
    (["--tls_ca", "empty.pem"], "empty.pem holds no certificate of an authority in PEM (no certificate or crl found)"),
    (["--tls_ca", "torn.pem"], "torn.pem holds no certificate of an authority in PEM"),
    (["--tls_ca", "ca.pem", "--tls_cert", "mine.pem", "--tls_key", "ca.pem"], "mine.pem and ca.pem are no certificate"),
    (["--tls_ca", "ca.pem", "--tls_cert", "ca.pem", "--tls_key", "mine.key"], "(key values mismatch)"),
    (["--tls_ca", "ca.pem", "--tls_cert", "mine.pem", "--tls_key", "locked.key"], "its unencrypted key in PEM"),
    (["--tls_ca", "ca.pem", "--tls_cert", "ca.pem"], "give both --tls_cert and --tls_key"),
    (["--tls_key", "ca.pem"], "need --tls_ca"),
])  # fmt: skip
def test_certificates_that_cannot_be_used_are_a_sentence(
    flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.pem").touch()
    authority = Authority(tmp_path / "ours")
    mine = authority.issue("mine")
    Path("mine.pem").write_bytes(mine.cert.read_bytes())
    Path("mine.key").write_bytes(mine.key.read_bytes())
    Path("locked.key").write_bytes(locked(mine.key))
    Path("ca.pem").write_bytes(authority.cert.read_bytes())
    Path("torn.pem").write_bytes(authority.cert.read_bytes()[:300] + authority.cert.read_bytes()[340:])
    tifffile.imwrite("volume.tif", np.zeros((2, 64, 64), np.uint8), photometric="minisblack")
    assert main(["volume.tif", "--url", "localhost:1", *flags]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_file_that_is_missing_on_another_machine_is_a_sentence(tmp_path: Path) -> None:
    """Certificates are named here and read there, as on a Dask worker."""
    path = Authority(tmp_path / "ours").cert
    sent = pickle.dumps(Tls(str(path)))
    path.unlink()
    with pytest.raises(ClientError, match=r"ca\.pem cannot be read: No such file"):
        Segmenter("localhost:1", tls=pickle.loads(sent))


def test_http_is_no_way_round(secured: Secured) -> None:
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    image = http.InferInput("image", [1, 1, 204, 204], "UINT8")
    image.set_data_from_numpy(np.zeros((1, 1, 204, 204), np.uint8))
    with http.InferenceServerClient(secured.server.settings.http_url) as client:
        assert client.is_server_ready()
        for ask in (
            lambda: client.infer("unet", [image]),
            lambda: client.get_model_config("unet"),
            client.get_server_metadata,
            client.get_system_shared_memory_status,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                ask()
    # The supervisor has the key.
    control_of(secured.server.settings.state_dir).canary("unet", TIMEOUT_S)


def test_what_belongs_together_is_asked_for(tmp_path: Path) -> None:
    there = tmp_path / "there.pem"
    there.touch()
    for changes, words in (
        ({"tls_cert": there}, "go together"),
        ({"tls_client_ca": there}, "needs both"),
        ({"tls_cert": there, "tls_key": tmp_path / "gone.key"}, r"gone\.key does not exist"),
        ({"admin_key_file": tmp_path / "gone"}, "gone does not exist"),
        ({"model_control": "poll"}, "model_control is poll"),
        ({"response_cache_mib": -1}, "response_cache_mib is -1"),
    ):
        with pytest.raises(TritonError, match=words):
            ServerSettings(tmp_path, tmp_path, tmp_path, **changes)  # type: ignore[arg-type]
