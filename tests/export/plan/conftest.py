"""Artefacts for a GPU, and a machine that has one by the contract of its libraries."""

from __future__ import annotations

import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from export.pipeline import ExportConfig, export_model
from tests.export.plan.contract import Cuda, Faults, Tensorrt

SIZES = (284, 300)


@pytest.fixture(scope="session")
def for_v100(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported artefacts without a plan. Tests that change them take a copy."""
    out = tmp_path_factory.mktemp("v100") / "artefacts"
    export_model(ExportConfig(model_dir, out, data_dir, "v100", SIZES), lambda _: None)
    return out


@pytest.fixture
def artefacts(for_v100: Path, tmp_path: Path) -> Path:
    """A copy of them."""
    return Path(shutil.copytree(for_v100, tmp_path / "artefacts"))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A machine with a V100 and TensorRT 10.4, by their contract; in the end nothing of the GPU may be in use."""
    driver = Cuda()
    package = types.ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    for name, module in (("pycuda", package), ("pycuda.driver", driver), ("tensorrt", Tensorrt(driver))):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(Faults, "current", Faults())
    yield driver
    assert driver.contexts == []
    assert driver.allocated == {}
