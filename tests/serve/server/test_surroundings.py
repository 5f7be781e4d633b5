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


CLOCK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long back(void) { return access(FILE_THAT_TURNS_IT_BACK, F_OK) == 0 ? 3600 : 0; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    int code = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec -= back();
    return code;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}
"""


def test_a_clock_that_jumps_back_an_hour_stops_nothing(
    repository: Path, settings_for: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which makes a clock that can be turned back, is not installed")
    (tmp_path / "clock.c").write_text(CLOCK)
    line = ["gcc", "-shared", "-fPIC", f'-DFILE_THAT_TURNS_IT_BACK="{tmp_path}/back"', "-o", str(tmp_path / "clock.so")]
    subprocess.run([*line, str(tmp_path / "clock.c"), "-ldl"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "clock.so"))
    flags = flags_for(settings_for, repository, tmp_path / "state")

    def run(action: str) -> str:
        done = subprocess.run([*SCRIPT, action, *flags], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done
        return done.stdout

    ask = [sys.executable, "-c", "import time; print(int(time.time()))"]
    before = int(subprocess.run(ask, capture_output=True, check=True).stdout)
    assert run("start").startswith("ready: ")
    try:
        (tmp_path / "back").touch()
        assert int(subprocess.run(ask, capture_output=True, check=True).stdout) < before - 3000
        expect_answers(tmp_path / "state")
        assert run("status").startswith("ready: ")
    finally:
        assert run("stop") == "stopped\n"
