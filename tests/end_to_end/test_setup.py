"""What `make` says on a machine that lacks something, before it starts any work."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def check_tools(project_root: Path, folder: Path, tools: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    """`make check-tools` on a machine that has the tools named and no others."""
    for tool in ("bash", *tools):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, "-s", "check-tools", f"SHELL={folder / 'bash'}", *words],
        cwd=project_root,
        env={"PATH": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("present", "python", "missing"),
    [
        (["g++"], True, "cmake"),
        (["cmake"], True, "g++"),
        ([], True, "g++, cmake"),
        (["g++", "cmake"], False, "Python 3.11 with venv"),
        ([], False, "Python 3.11 with venv, g++, cmake"),
    ],
)
def test_what_is_missing_is_named_in_one_sentence(
    project_root: Path, tmp_path: Path, present: list[str], python: bool, missing: str
) -> None:
    words = [f"PYTHON={sys.executable}"] if python else []
    done = check_tools(project_root, tmp_path, present, *words)
    assert done.returncode != 0
    assert done.stderr.splitlines()[0].startswith(f"error: not found: {missing}; install it")


def test_nothing_missing_is_silent(project_root: Path, tmp_path: Path) -> None:
    done = check_tools(project_root, tmp_path, ["g++", "cmake"], f"PYTHON={sys.executable}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("writes_none", [False, True])
def test_where_python_writes_no_bytecode_it_is_compiled_once(project_root: Path, writes_none: bool) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"} if writes_none else {}
    line = ["make", "-n", "-B", ".venv/.installed"]
    done = subprocess.run(line, cwd=project_root, env=environment, capture_output=True, text=True, check=True)
    assert ("--compile-bytecode --editable" in " ".join(done.stdout.split())) is writes_none


def test_the_lock_is_the_constraints_with_hashes(project_root: Path) -> None:
    lock = (project_root / "constraints.lock").read_text(encoding="utf-8")
    plain = re.sub(r" \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+", "\n", lock)
    assert plain == (project_root / "constraints.txt").read_text(encoding="utf-8"), "run `make constraints`"


def test_no_target_of_make_uses_a_variable_that_nothing_sets(project_root: Path) -> None:
    """Flags, a choice and the cache's place may be given by whoever calls; a package that is nowhere named may not."""
    targets = re.findall(r"^([a-z0-9-]+):.*  ## ", (project_root / "Makefile").read_text(), re.MULTILINE)
    command = ["make", "--dry-run", "--warn-undefined-variables", *targets]
    done = subprocess.run(command, cwd=project_root, capture_output=True, text=True, check=False)
    undefined = set(re.findall(r"undefined variable '(\w+)'", done.stderr))
    given = {"BACKGROUND", "XDG_CACHE_HOME", *(name for name in undefined if name.endswith("_FLAGS"))}
    assert undefined <= given
    assert len(targets) > 20
