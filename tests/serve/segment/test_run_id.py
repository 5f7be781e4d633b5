"""A client's lines and its servers' log name the same run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile

from serve.client import main
from serve.segment.connection import Connection
from serve.segment.errors import ClientError
from serve.segment.settings import Settings
from serve.server.process import TritonServer


def test_a_request_carries_the_run_and_its_number(triton_server: TritonServer) -> None:
    connection = Connection(triton_server.settings.grpc_url, "unet", "", 30.0)
    connection.run_id = "night-7"
    try:
        connection.interface(30.0)
        wrong = connection.grpc.InferInput("image", [9, 1, 204, 204], "UINT8")
        wrong.set_data_from_numpy(np.zeros((9, 1, 204, 204), np.uint8))
        for number in range(2):
            with pytest.raises(Exception, match="refused") as caught:
                connection.infer([wrong], [])
            # Triton gives the id back beside its reason, and our sentence leaves it out.
            assert f"[request id: night-7-{number}]" in str(caught.value.__cause__)
            assert "night-7" not in str(caught.value)
    finally:
        connection.close()


def test_lines_are_json_with_the_run(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tifffile.imwrite(tmp_path / "v.tif", np.full((1, 50, 50), 1000, np.uint16), photometric="minisblack")
    words = [str(tmp_path / "v.tif"), str(tmp_path / "none.tif"), "--url", triton_server.settings.grpc_url]
    assert main([*words, "--quiet", "--log_format", "json", "--run_id", "night-7"]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert {line["level"] for line in lines} <= {"warning", "error"}
    assert {line["run"] for line in lines} == {"night-7"}
    assert lines[0]["time"].endswith("+00:00")
    assert any("none.tif" in line["message"] for line in lines)
    # The next command says text again.
    assert main([str(tmp_path / "none.tif"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_run_has_a_name_of_its_own() -> None:
    assert Settings().run_id != Settings().run_id
    assert Settings(run_id="night-7").run_id == "night-7"
    with pytest.raises(ClientError, match="is not up to 64 letters"):
        Settings(run_id="night 7")
