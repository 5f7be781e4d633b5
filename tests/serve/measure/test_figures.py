"""The client's figures are measured by commands; here each is run briefly, for its answer and not for its speed."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from serve.figures import main
from serve.measure.figures import speed_ratio
from serve.measure.meter import ServerCounts
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.connection import Connection
from serve.segment.segmenter import Segmenter
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    assert speed_ratio({"a": [1.0, 1.0, 9.0], "b": [2.0, 4.0, 9.0]}, "a", "b") == 2.0


def test_the_memory_curve_is_drawn(triton_server: TritonServer, tmp_path: Path) -> None:
    line = ["memory", "--url", triton_server.settings.grpc_url, "--slices", "2", "4", "--side", "70"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "memory.json").read_text())
    assert set(found) == {"2 slices", "4 slices"}
    assert Image.open(tmp_path / "memory.png").size[0] > 500


@pytest.mark.parametrize("clients", [8])
def test_many_clients_get_their_own_answers(triton_server: TritonServer, tmp_path: Path, clients: int) -> None:
    line = ["soak", "--url", triton_server.settings.grpc_url, "--clients", str(clients), "--seconds", "1"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert (found["wrong"], found["gave_up"]) == (0, {})
    assert found["answers"] >= clients


def test_what_a_soak_found_outlives_its_server(
    settings_for: Callable[..., ServerSettings],
    tiny_artefacts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve.measure.figures.Segmenter", partial(Segmenter, patience_s=0))
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models")) as server, ThreadPoolExecutor(1) as pool:
        url = server.settings.grpc_url
        line = ["soak", "--url", url, "--clients", "2", "--seconds", "3600", "--out", str(tmp_path)]
        soak = pool.submit(main, line)
        connection = Connection(url, "unet", "", 60)
        while ServerCounts.read(connection).requests < 40:
            assert not soak.done(), soak.result()
        connection.close()
        server.stop()
        assert soak.result(timeout=120) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    assert (found["wrong"], sum(found["gave_up"].values())) == (0, 2)
    assert found["answers"] > 0


def test_servers_share_the_work(
    triton_server: TritonServer, tiny_artefacts: Path, settings_for: Callable[..., ServerSettings], tmp_path: Path
) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models")) as second:
        urls = [triton_server.settings.grpc_url, second.settings.grpc_url]
        assert main(["servers", "--servers", *urls, "--rounds", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "servers.json").read_text())
    assert found["servers"] == 2
    assert found["ratio"] == pytest.approx(found["together_slices_per_s"] / found["one_slices_per_s"])


def test_what_a_response_cache_answers_is_no_figure(
    tiny_artefacts: Path,
    settings_for: Callable[..., ServerSettings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8, response_cache=True))
    with TritonServer(settings_for(tmp_path / "models", response_cache_mib=64)) as server:
        url = server.settings.grpc_url
        assert main(["servers", "--servers", url, "--rounds", "1", "--out", str(tmp_path)]) == 2
        assert "answered from the response cache" in capsys.readouterr().err
        assert main(["soak", "--url", url, "--clients", "2", "--seconds", "0.2", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "soak.json").read_text())["from_cache"] > 0
    assert not (tmp_path / "servers.json").exists()


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_slices(triton_server: TritonServer, tmp_path: Path) -> None:
    line = ["memory", "--url", triton_server.settings.grpc_url, "--slices", "30", "3000", "--side", "128"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["3000 slices"]["peak_mib"] < found["30 slices"]["peak_mib"] + 32
