"""A server in unusual surroundings: paths with spaces, no HOME, no TMPDIR, a repository that cannot be written."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve.server.state import load_state
from tests.serve.server.conftest import ROOT, TIMEOUT_S, MakeSettings, in_namespace, infer

SCRIPT = [sys.executable, "serve/triton.py"]
pytestmark = pytest.mark.usefixtures("nothing_left_behind")


def flags_for(settings_for: MakeSettings, repository: Path, state_dir: Path) -> list[str]:
    ports = settings_for(repository).ports
    line = ["--model_repository", str(repository), "--state_dir", str(state_dir)]
    return line + [word for name, port in ports.items() for word in (f"--{name}", str(port))]


def expect_answers(state_dir: Path) -> None:
    state = load_state(state_dir)
    assert state is not None
    white = np.full((1, 1, 204, 204), 255, np.uint8)
    np.testing.assert_allclose(infer(state.grpc_url, white), np.ones((1, 1, 20, 20)), atol=1e-3)


def test_paths_with_spaces_no_home_and_no_tmpdir(repository: Path, settings_for: MakeSettings, tmp_path: Path) -> None:
    checkout = tmp_path / "a checkout; of $USER's"
    checkout.mkdir()
    for package in ("serve", "unet"):
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    venv = Path(sys.prefix)
    (checkout / ".venv").mkdir()
    shutil.copyfile(venv / "pyvenv.cfg", checkout / ".venv" / "pyvenv.cfg")
    for name in ("bin", "lib"):
        (checkout / ".venv" / name).symlink_to(venv / name)
    repository.rename(checkout / "model repository")
    python = str(checkout / ".venv" / "bin" / "python")
    flags = flags_for(settings_for, checkout / "model repository", checkout / "a state")
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {"TMPDIR": str(tmp_path / "missing"), "PYTHONPATH": str(checkout)}

    def run(action: str) -> str:
        done = subprocess.run(
            [python, "serve/triton.py", action, *flags],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done
        return done.stdout

    assert run("start").startswith("ready: ")
    state = load_state(checkout / "a state")
    assert state is not None
    links = Path(state.links)
    try:
        assert (links / "models").resolve() == checkout / "model repository"
        expect_answers(checkout / "a state")
        assert run("status").startswith("ready: ")
    finally:
        assert run("stop") == "stopped\n"
    assert not links.exists()


def test_a_repository_that_cannot_be_written_and_a_home_that_cannot_either(
    repository: Path, settings_for: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/proc")
    flags = flags_for(settings_for, repository, tmp_path / "state")
    mounts = f"mount --bind {repository} {repository} && mount -o remount,ro,bind {repository}"
    done = in_namespace(f"{mounts} && ! touch {repository}/file 2>/dev/null", [*SCRIPT, "start", *flags])
    assert done.returncode == 0, done
    try:
        expect_answers(tmp_path / "state")
    finally:
        subprocess.run([*SCRIPT, "stop", *flags], cwd=ROOT, check=True, capture_output=True)
