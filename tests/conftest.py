"""Fixtures that every room's tests may use."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# A shell without job control starts what runs in the background with Ctrl-C ignored, and all children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# So does `nohup` with a closed terminal. A handler of this process's own stays here; its children have the default.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)


@pytest.fixture(scope="session")
def isbi_dir() -> Path:
    """The folder of the real ISBI 2012 slices; tests that need them are skipped where it has none."""
    folder = ROOT / os.environ.get("DATA_DIR", "data")
    if not (folder / "train-volume.tif").exists():
        pytest.skip(f"the ISBI 2012 slices are not in {folder}; name their folder with DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def project_root() -> Path:
    """The folder that holds README.md and the Makefile."""
    return ROOT
