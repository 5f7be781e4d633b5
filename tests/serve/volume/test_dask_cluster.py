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
import zarr

from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings

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


def volume(path: Path) -> Path:
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    images = RNG.integers(0, 4000, (4, 300, 170)).astype(np.uint16)
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
    source = volume(tmp_path / "v.zarr")
    kinds = ["--output", "probability", "--output", "labels"]
    line = [str(source), "--url", triton_server.settings.grpc_url, *kinds]
    assert main([*line, "--quiet", "--output_dir", str(tmp_path / "alone")]) == 0
    out = tmp_path / "together"
    together = [*line, "--url", second_url, "--dask", cluster, "--output_dir", str(out)]
    with subprocess.Popen(
        [sys.executable, "serve/client.py", *together], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        journal = out / "v.partial" / "journal.jsonl"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2:
            assert process.poll() is None, process.communicate()
        process.kill()
    assert main([*together, "--resume", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recalled"] >= 1
    for name in ("v-probability.zarr", "v-labels.zarr"):
        assert contents(out / name) == contents(tmp_path / "alone" / name)
    assert {path.name for path in out.iterdir()} == {"v-probability.zarr", "v-labels.zarr"}


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
