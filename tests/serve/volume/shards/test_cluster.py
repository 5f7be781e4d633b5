"""Shards on Dask clusters: over TLS, with workers that come and go, and a scheduler that dies."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
import pytest

from serve.client import main
from serve.server.process import TritonServer
from tests.serve.authority import Authority
from tests.serve.volume.shards.test_shards import contents, make_volume
from unet.processes import free_ports

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a part of a cluster; all end with the test."""
    running = []

    def process(part: str, *words: str) -> subprocess.Popen[bytes]:
        line = [sys.executable, "-m", f"distributed.cli.dask_{part}", *words, "--no-dashboard"]
        running.append(subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        return running[-1]

    yield process
    for each in running:
        each.kill()
        each.wait()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_volume(tmp_path_factory.mktemp("volume") / "v.zarr", (300, 60, 50), (50, 60, 50))


@pytest.fixture(scope="module")
def line(source: Path, triton_server: TritonServer) -> list[str]:
    words = [str(source), "--url", triton_server.settings.grpc_url, "--quiet", "--shard_mpx", "0.003"]
    return [*words, "--output", "mask", "--output", "labels", "--patience_s", "20"]


@pytest.fixture(scope="module")
def alone(source: Path, line: list[str]) -> dict[str, str]:
    assert main([*line, "--output_dir", str(source.parent / "alone")]) == 0
    return contents(source.parent / "alone")


def test_over_tls_and_a_wrong_authority_is_refused(
    start: Start, line: list[str], alone: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority, other = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    pair, stranger = authority.issue("cluster"), other.issue("stranger")
    port = free_ports(1)[0]
    address = f"tls://127.0.0.1:{port}"
    files = ["--tls-ca-file", str(authority.cert), "--tls-cert", str(pair.cert), "--tls-key", str(pair.key)]
    start("scheduler", "--protocol", "tls", "--host", "127.0.0.1", "--port", str(port), *files)
    start("worker", address, "--nthreads", "2", "--no-nanny", *files)
    security = distributed.Security(
        tls_ca_file=str(authority.cert), tls_client_cert=str(pair.cert), tls_client_key=str(pair.key)
    )
    with distributed.Client(address, timeout=60, set_as_default=False, security=security) as client:
        client.wait_for_workers(1, timeout=60)

    def with_files(ca: Path, cert: Path, key: Path) -> int:
        words = ["--dask_tls_ca", str(ca), "--dask_tls_cert", str(cert), "--dask_tls_key", str(key)]
        return main([*line, "--output_dir", str(tmp_path / "out"), "--dask", address, *words, "--overwrite"])

    assert with_files(other.cert, stranger.cert, stranger.key) == 2
    said = capsys.readouterr().err
    assert f"the certificate of the Dask scheduler at {address} is not one of {other.cert}" in said
    assert said.count("\n") == 1
    assert with_files(authority.cert, stranger.cert, stranger.key) == 2
    assert f"{address} does not accept this side's certificate" in capsys.readouterr().err
    assert with_files(authority.cert, pair.cert, pair.key) == 0
    assert contents(tmp_path / "out") == alone


def test_workers_that_come_late_and_die_and_a_scheduler_that_dies(
    start: Start, line: list[str], alone: dict[str, str], tmp_path: Path
) -> None:
    """As an adaptive cluster does: no worker at first, then one, which is taken away, then another."""
    port = free_ports(1)[0]
    address = f"tcp://127.0.0.1:{port}"
    scheduler = start("scheduler", "--host", "127.0.0.1", "--port", str(port))
    done = tmp_path / "v.shards" / "done"
    words = [sys.executable, "serve/client.py", *line, "--output_dir", str(tmp_path), "--dask", address]

    def reached(count: int, client: subprocess.Popen[str]) -> None:
        while not done.exists() or len(list(done.iterdir())) < count:
            assert client.poll() is None, client.communicate()
            time.sleep(0.01)

    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as client:
        first = start("worker", address, "--nthreads", "1", "--no-nanny")
        reached(5, client)
        first.kill()
        start("worker", address, "--nthreads", "2", "--no-nanny")
        reached(60, client)
        scheduler.kill()
        said = client.communicate(timeout=60)[1]
    assert client.returncode == 2
    assert f"error: the Dask scheduler at {address} has gone" in said
    assert "add --resume to go on with it" in said
    assert said.count("\n") == 1
    # The rest without a cluster.
    assert main([*line, "--output_dir", str(tmp_path), "--resume"]) == 0
    assert contents(tmp_path) == alone


def test_a_cluster_without_workers_is_one_sentence(
    start: Start, line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_ports(1)[0]
    address = f"tcp://127.0.0.1:{port}"
    start("scheduler", "--host", "127.0.0.1", "--port", str(port))
    with distributed.Client(address, timeout=60, set_as_default=False):
        assert main([*line, "--output_dir", str(tmp_path), "--dask", address, "--patience_s", "1"]) == 2
    assert f"the Dask scheduler at {address} has no workers: start some" in capsys.readouterr().err
