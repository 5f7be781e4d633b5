"""The calls of TensorRT fit the types of its real bindings, by mypy.

The stubs lie where nothing imports them: installed as usual they would take the place of TensorRT, and ask for it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from unet.files import atomic_directory

MODULES = ("export/plan/serialize.py", "unet/engine/plan.py")
# MIT, generated from the bindings; none are nearer to 10.4.
STUBS = "tensorrt-stubs==10.8.0.43.1"
# What the generator got wrong: words and orders that Python does not allow, a constant that hides the type bool, and
# that the bindings take a tuple for Dims.
FAULTS = {
    " in: list[": " in_: list[",
    "= None, channel_axis: int)": "= None, channel_axis: int = ...)",
    "\nbool: ": "\nbool_: ",
    "min: Dims, opt: Dims, max: Dims": "min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]",
}
# By module: a call, the same with a mistake, and what mypy says of that.
MISTAKES = {
    "export/plan/serialize.py": [
        ("build_serialized_network(network, config)", "build_serialized_network(config, network)", "[arg-type]"),
        ("create_engine_inspector()", "create_inspector()", "[attr-defined]"),
        ("set_shape(wanted.tensor, least, usual, most)", "set_shape(wanted.tensor, least, usual)", "[call-arg]"),
        ("MemoryPoolType.WORKSPACE", "MemoryPoolType.WORK", "[attr-defined]"),
        ("ProfilingVerbosity.DETAILED", "ProfilingVerbosity.DETAIL", "[attr-defined]"),
        (
            "builder_optimization_level = settings.optimization_level",
            "builder_optimization_level = '5'",
            "[assignment]",
        ),
    ],
    "unet/engine/plan.py": [
        ("set_tensor_address(name, ", "set_tensor_address(0, ", "[arg-type]"),
        ("execute_async_v3(self._stream.handle)", "execute_async_v3()", "[call-arg]"),
        ("set_optimization_profile_async(", "set_optimization_profile(", "[attr-defined]"),
    ],
}


@pytest.fixture(scope="module")
def stubs(project_root: Path) -> Path:
    """A folder for MYPYPATH, kept from one run to the next."""
    folder = project_root / ".cache" / STUBS
    if not folder.exists():
        with atomic_directory(folder) as aside:
            line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--ignore-requires-python", "--target"]
            done = subprocess.run([*line, str(aside), STUBS], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                pytest.skip(f"{STUBS} cannot be fetched: {done.stderr.strip().splitlines()[-1]}")
            bindings = aside / "tensorrt_bindings" / "tensorrt.pyi"
            text = bindings.read_text(encoding="utf-8")
            for wrong, right in FAULTS.items():
                assert wrong in text
                text = text.replace(wrong, right)
            bindings.write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def check(project_root: Path, stubs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """A function of files by the module whose place they take, to what mypy says."""
    cache = tmp_path_factory.mktemp("mypy")

    def run(shadows: Mapping[str, Path]) -> list[str]:
        line = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), "--no-error-summary"]
        for module, file in shadows.items():
            line += ["--shadow-file", module, str(file)]
        done = subprocess.run(
            [*line, *MODULES],
            cwd=project_root,
            env={**os.environ, "MYPYPATH": str(stubs)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode in (0, 1), done.stderr
        return [line for line in done.stdout.splitlines() if ": error: " in line]

    return run


def test_every_call_fits(check: Callable[..., list[str]]) -> None:
    assert check({}) == []


def test_a_call_that_does_not_fit_is_reported(
    check: Callable[..., list[str]], project_root: Path, tmp_path: Path
) -> None:
    shadows, due = {}, []
    for module, mistakes in MISTAKES.items():
        text = (project_root / module).read_text(encoding="utf-8")
        for call, mistake, kind in mistakes:
            assert text.count(call) == 1
            due.append((f"{module}:{text[: text.index(call)].count(chr(10)) + 1}", kind))
            text = text.replace(call, mistake)
        shadows[module] = tmp_path / Path(module).name
        shadows[module].write_text(text, encoding="utf-8")
    found = {(":".join(line.split(":")[:2]), line.split()[-1]) for line in check(shadows)}
    assert found == set(due)
