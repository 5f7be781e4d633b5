"""The server's log is what the page on serving says: one line each, taken apart by one pattern, with requests' ids."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from serve.segment.connection import Connection
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings, admin_key


@pytest.fixture
def pattern(project_root: Path) -> re.Pattern[str]:
    """The pattern on the page."""
    page = (project_root / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = re.search(r"```text\n(\^.*\$)\n```", page.partition("### Log")[2])
    assert shown is not None
    return re.compile(shown[1])


@pytest.fixture
def server(repository: Path, settings_for: Callable[..., ServerSettings]) -> Iterator[TritonServer]:
    with TritonServer(settings_for(repository)) as server:
        yield server


def segment(server: TritonServer, run: str) -> None:
    connection = Connection(server.settings.grpc_url, "unet", "", 30.0)
    connection.run_id = run
    try:
        connection.interface(30.0)
        image = connection.grpc.InferInput("image", [1, 1, 204, 204], "UINT8")
        image.set_data_from_numpy(np.zeros((1, 1, 204, 204), np.uint8))
        connection.infer([image], [])
    finally:
        connection.close()


def set_verbose(server: TritonServer, level: int) -> None:
    url = f"http://{server.settings.http_url}/v2/logging"
    content = json.dumps({"log_verbose_level": level}).encode()
    request = urllib.request.Request(url, content, {"admin-key": admin_key(server.settings)[1]})
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["log_verbose_level"] == level


def log_lines(server: TritonServer) -> list[str]:
    """Triton's own lines: its tables and a model's own prints are no log lines."""
    text = server.settings.log.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if '] "' in line and line[0] != "|"]


def test_each_line_is_taken_apart_and_names_requests_once_it_is_verbose(
    server: TritonServer, pattern: re.Pattern[str]
) -> None:
    segment(server, "quiet")
    # Looked at before the log is made verbose: Triton releases a request after it has sent the
    # answer, and a verbose log names that too.
    assert not any("quiet-0" in line for line in log_lines(server))
    set_verbose(server, 1)
    segment(server, "loud")
    set_verbose(server, 0)
    lines = log_lines(server)
    found = [pattern.match(line) for line in lines]
    assert None not in found, [line for line, match in zip(lines, found) if match is None]
    assert {match["level"] for match in found if match} <= set("IWEFV")
    messages = [json.loads(match["message"]) for match in found if match]
    assert any("[request id: loud-0]" in message for message in messages)
