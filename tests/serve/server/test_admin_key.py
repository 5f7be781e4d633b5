"""The admin key is where its owner alone can read it."""

from __future__ import annotations

import os
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from serve.models.library import arguments_library
from serve.server.process import TritonServer
from serve.server.regions import ADMIN_KEY_HEADER
from serve.server.settings import admin_key

pytestmark = pytest.mark.skipif(not arguments_library().is_file(), reason="`make install` could not build the library")


def index_status(server: TritonServer, key: str) -> int:
    """What the model index, which only the key opens, answers to a key."""
    address = f"http://127.0.0.1:{server.settings.http_port}/v2/repository/index"
    request = urllib.request.Request(address, data=b"{}", headers={ADMIN_KEY_HEADER: key}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_no_process_shows_the_key(triton_server: TritonServer) -> None:
    key = admin_key(triton_server.settings)[1]
    lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert [line for line in lines if key in line] == []
    assert key not in triton_server.settings.log.read_text(encoding="utf-8", errors="replace")
    assert index_status(triton_server, key) == 200
    # What the list of processes shows opens nothing.
    assert triton_server.pid is not None
    server = psutil.Process(triton_server.pid)
    shown = {word.partition(f"{ADMIN_KEY_HEADER}=")[2] for word in server.cmdline() if f"{ADMIN_KEY_HEADER}=" in word}
    assert len(shown) == 1
    assert index_status(triton_server, shown.pop()) == 403


def replaced(*words: str, file: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(arguments_library()),
        "UNET_ARGUMENT_FILE": str(file),
        "UNET_ARGUMENT_PLACEHOLDER": "WORD",
    }
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_a_placeholder_is_replaced_inside_the_process_alone(tmp_path: Path) -> None:
    file = tmp_path / "admin.key"
    file.write_text("secret\n")
    done = replaced("/bin/sh", "-c", 'echo "$0 $1"; tr "\\0" " " < /proc/$$/cmdline', "a=WORD,", "another", file=file)
    inside, seen = done.stdout.splitlines()
    assert inside == "a=secret, another"
    assert seen.endswith("a=WORD, another ")
    assert replaced("/bin/echo", "WORD", file=tmp_path / "none").returncode == 78
    assert "none, which holds the admin key, cannot be read" in replaced("/bin/echo", file=tmp_path / "none").stderr
