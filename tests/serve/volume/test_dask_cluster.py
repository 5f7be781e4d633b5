"""An OME-Zarr volume on a Dask cluster of two workers and two servers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
import numpy as np
import pytest
import tifffile
import zarr

from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.errors import ClientError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from serve.volume.dask_connection import DaskCluster
from unet.processes import free_ports

RNG = np.random.default_rng(3)


@pytest.fixture
def second_url(tiny_artefacts: Path, settings_for: Callable[..., ServerSettings], tmp_path: Path) -> Iterator[str]:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models")) as running:
        yield running.settings.grpc_url


@pytest.fixture
def cluster() -> Iterator[str]:
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, scheduler_port=0
    ) as local:
        yield str(local.scheduler_address)


def volume(path: Path, pages: int = 4) -> Path:
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    images = RNG.integers(0, 4000, (pages, 300, 170)).astype(np.uint16)
    group.create_array("0", data=images, chunks=(2, 128, 128), chunk_key_encoding={"name": "v2", "separator": "/"})
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    transforms = [{"type": "scale", "scale": [50.0, 4.0, 4.0]}]
    datasets = [{"path": "0", "coordinateTransformations": transforms}]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": datasets}]
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {item.relative_to(path).as_posix(): item.read_bytes() for item in path.rglob("*") if item.is_file()}


def test_the_cluster_writes_what_one_process_does_and_goes_on_after_a_crash(
    triton_server: TritonServer,
    second_url: str,
    cluster: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = volume(tmp_path / "v.zarr", 80)
    kinds = ["--output", "probability", "--output", "labels"]
    line = [str(source), "--url", triton_server.settings.grpc_url, *kinds]
    assert main([*line, "--quiet", "--output_dir", str(tmp_path / "alone")]) == 0
    out = tmp_path / "together"
    together = [*line, "--url", second_url, "--dask", cluster, "--output_dir", str(out)]
    together += ["--shard_mpx", "0.05"]
    with subprocess.Popen(
        [sys.executable, "serve/client.py", *together], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        done = out / "v.shards" / "done"
        while not done.exists() or len(list(done.iterdir())) < 5:
            assert process.poll() is None, process.communicate()
        process.kill()
    assert main([*together, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recalled"] >= 1
    for name in ("v-probability.zarr", "v-labels.zarr"):
        assert contents(out / name) == contents(tmp_path / "alone" / name)
    assert {path.name for path in out.iterdir()} == {"v-probability.zarr", "v-labels.zarr"}


def test_a_scheduler_that_goes_while_it_hands_a_result_over_has_gone() -> None:
    class Future:
        status = "finished"

        def result(self) -> None:
            raise distributed.comm.CommClosedError("in <TCP local=tcp://127.0.0.1:1>: Stream is closed")

    address = "tcp://127.0.0.1:1"
    with pytest.raises(ClientError, match=rf"^the Dask scheduler at {address} has gone: start it again$"):
        DaskCluster(address, 1.0).result(Future(), "shard 3")


@pytest.mark.parametrize(
    ("address", "sentence"), [("tcp://127.0.0.1:1", "no Dask scheduler answers at tcp://127.0.0.1:1")]
)
def test_no_cluster_is_one_sentence(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], address: str, sentence: str
) -> None:
    source = volume(tmp_path / "v.zarr")
    line = [str(source), "--url", triton_server.settings.grpc_url, "--dask", address, "--output", "mask"]
    assert main(line) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["v.zarr"]


def start_scheduler(port: int) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    return subprocess.Popen([*line, "--no-dashboard"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def start_worker(address: str) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard"]
    return subprocess.Popen([*line, "--no-nanny"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.fixture
def parts() -> Iterator[tuple[str, subprocess.Popen[bytes], list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers, each a process that a test may end."""
    port = free_ports(1)[0]
    address = f"tcp://127.0.0.1:{port}"
    scheduler = start_scheduler(port)
    workers = [start_worker(address) for _ in range(2)]
    try:
        with distributed.Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
        yield address, scheduler, workers
    finally:
        for process in (*workers, scheduler):
            process.kill()
            process.wait()


def begun(out: Path, line: list[str]) -> subprocess.Popen[str]:
    """A client that has some slices already."""
    process = subprocess.Popen(
        [sys.executable, "serve/client.py", *line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    journal = out / "v.partial" / "journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b'"page"') < 5:
        assert process.poll() is None, process.communicate()
    return process


def test_a_tiff_and_the_death_of_a_worker_and_of_the_scheduler(
    triton_server: TritonServer,
    parts: tuple[str, subprocess.Popen[bytes], list[subprocess.Popen[bytes]]],
    tmp_path: Path,
) -> None:
    address, scheduler, workers = parts
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, RNG.integers(0, 256, (240, 300, 170), np.uint8), photometric="minisblack")
    line = [str(source), "--url", triton_server.settings.grpc_url, "--output", "mask", "--output", "probability"]
    assert main([*line, "--quiet", "--output_dir", str(tmp_path / "alone")]) == 0
    # One of two workers dies: the other one does its work.
    out = tmp_path / "together"
    together = [*line, "--dask", address, "--quiet", "--patience_s", "2"]
    with begun(out, [*together, "--output_dir", str(out)]) as process:
        workers[0].kill()
        assert (process.wait(120), process.communicate()[1]) == (0, "")
    assert contents(out) == contents(tmp_path / "alone")
    # The scheduler dies: one sentence, and the rest can be done without.
    out = tmp_path / "once-more"
    with begun(out, [*together, "--output_dir", str(out)]) as process:
        scheduler.kill()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert f"error: the Dask scheduler at {address} has gone" in said
    assert "add --resume to go on with it" in said
    assert said.count("\n") == 1
    assert main([*line, "--quiet", "--output_dir", str(out), "--resume"]) == 0
    assert contents(out) == contents(tmp_path / "alone")
