"""Every TensorRT name in our code exists in the real bindings of 10.4.0 and 11.4.0, and in TensorRT-RTX.

TensorRT 11 has no weakly typed networks any more: no EXPLICIT_BATCH and no FP16. Our code needs neither.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

NAMES = Path(__file__).parent / "tensorrt_names"
RELEASES = ("10.4.0", "11.4.0")
# Which variables of the two modules hold what TensorRT gave.
ROOTS = {"trt", "builder", "network", "config", "parser", "profile", "engine", "inspector", "cache", "kept"}
MEMBERS = {"_engine", "_execution"}
# Asked for before use: only TensorRT-RTX has these.
MISSING = {"ComputeCapability", "num_compute_capabilities", "set_compute_capability"}
PYTHON = {"__version__", "__name__", "__init__"}


def names_used(path: Path) -> set[str]:
    """The attributes that a module takes of TensorRT's objects, and of what those give."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        chain, inner = [], node
        while isinstance(inner, (ast.Attribute, ast.Call, ast.Subscript)):
            if isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
            inner = inner.func if isinstance(inner, ast.Call) else inner.value
        if isinstance(inner, ast.Name) and chain:
            if inner.id == "self" and chain[-1] in MEMBERS:
                found |= set(chain[:-1])
            elif inner.id in ROOTS:
                found |= set(chain)
    return found - PYTHON


@pytest.fixture(scope="module")
def used(project_root: Path) -> set[str]:
    return names_used(project_root / "export/plan/serialize.py") | names_used(project_root / "unet/engine/plan.py")


def test_the_calls_are_found_in_the_code(used: set[str]) -> None:
    assert {"build_serialized_network", "add_optimization_profile", "execute_async_v3", "set_input_shape"} <= used
    assert {"OnnxParser", "WORKSPACE", "DETAILED", "STRONGLY_TYPED", "device_memory_size_v2", "num_errors"} <= used
    assert not {"FP16", "EXPLICIT_BATCH", "OBEY_PRECISION_CONSTRAINTS"} & used


@pytest.mark.parametrize("release", RELEASES)
def test_they_are_in_the_bindings(used: set[str], release: str) -> None:
    recorded = (NAMES / f"{release}.txt").read_text(encoding="utf-8").splitlines()
    assert recorded[0].startswith("# tensorrt")
    # The linker lets a string share the end of a longer one.
    missing = {name for name in used if not any(known.endswith(name) for known in recorded[1:])}
    assert missing == MISSING


def test_weak_typing_is_gone_from_tensorrt_11() -> None:
    recorded = {release: (NAMES / f"{release}.txt").read_text(encoding="utf-8").split() for release in RELEASES}
    for name in ("EXPLICIT_BATCH", "FP16"):
        assert (name in recorded["10.4.0"], name in recorded["11.4.0"]) == (True, False)


def test_names_of_no_release_would_be_noticed() -> None:
    for release in RELEASES:
        recorded = (NAMES / f"{release}.txt").read_text(encoding="utf-8").splitlines()[1:]
        for name in ("set_max_workspace", "create_optimisation_profile", "execute_async_v4"):
            assert not any(known.endswith(name) for known in recorded)


def test_they_are_in_tensorrt_rtx(used: set[str]) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: make install-rtx")
    known = {name for thing in vars(rtx).values() for name in dir(thing)} | set(dir(rtx))
    assert used <= known
