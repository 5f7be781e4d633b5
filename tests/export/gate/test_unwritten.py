"""No answer depends on memory that nobody wrote, as a gradient of oneDNN's does on processors with AMX."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ANSWERS = """
import hashlib, sys
import numpy as np
from unet.engine.cpu import CpuEngine, supported_choices

for choice in supported_choices():
    engine = CpuEngine(sys.argv[1], choice, 2)
    for count, side in ((1, 204), (3, 220), (1, 444)):
        image = np.random.default_rng(side).integers(0, 256, (count, 1, side, side)).astype(np.uint8)
        for _ in range(2):
            answer = engine.infer(image)
            assert np.isfinite(answer).all()
            print(choice, count, side, hashlib.sha256(np.ascontiguousarray(answer).tobytes()).hexdigest())
"""
FORGETFUL = """
import numpy as np
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
print(ctypes.string_at(libc.malloc(1000), 4).hex())
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layer") / "unwritten.so"
    source = Path(__file__).with_name("unwritten.c")
    subprocess.run([os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-o", out, source], check=True)
    return out


def run(library: Path, byte: str, root: Path, code: str, *words: str) -> str:
    environment = {**os.environ, "LD_PRELOAD": str(library), "UNWRITTEN_BYTE": byte, "PYTHONPATH": str(root)}
    line = [sys.executable, "-c", code, *words]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=True).stdout


def test_no_engine_reads_memory_that_it_has_not_written(
    library: Path, random_saved_model: Callable[..., None], tmp_path: Path, project_root: Path
) -> None:
    """All bytes of 0xFF are NaN in float32, bfloat16 and float16; those of 0x01 are nearly 0."""
    from export.steps.graph import write_model
    from export.steps.half_precision import to_half
    from export.steps.to_onnx import convert

    random_saved_model(tmp_path / "saved_model", base_filters=16)
    write_model(to_half(convert(tmp_path / "saved_model")), tmp_path / "model.fp16.onnx")
    answers = [run(library, byte, project_root, ANSWERS, str(tmp_path / "model.fp16.onnx")) for byte in ("ff", "01")]
    assert answers[0] == answers[1]
    assert "onnxruntime f32 1 444 " in answers[0]


def test_the_layer_fills_what_is_allocated(library: Path, project_root: Path) -> None:
    assert [run(library, byte, project_root, FORGETFUL) for byte in ("ff", "01")] == ["ffffffff\n", "01010101\n"]
