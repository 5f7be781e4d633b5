from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, project_root: Path) -> Path:
    """A copy of the project as git sees it, with this environment as its `.venv`."""
    stamp = Path(sys.executable).parent.parent / ".installed"
    sources = [project_root / name for name in ("pyproject.toml", "constraints.lock", "Makefile")]
    if not stamp.exists() or stamp.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        # The checkout's own make would install itself into the environment that it borrows.
        pytest.fail("the environment is older than the project's settings: run `make install` first")
    folder = tmp_path_factory.mktemp("checkout") / "project"
    line = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(line, cwd=project_root, capture_output=True, check=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (project_root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(project_root / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
    return folder


@pytest.fixture(scope="session")
def user_environment() -> dict[str, str]:
    """What a shell has after `source .venv/bin/activate`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "PYTEST"))}
    return {**kept, "PATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "DATA_DIR": "data"}
