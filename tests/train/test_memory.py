"""The memory of a whole training run, validation and SavedModel included, is bounded whatever the number of slices.

``pytest -m slow -s tests/train/test_memory.py`` prints the figures.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from unet.errors import say
from unet.phantom import synthetic_stack

MAIN = Path(__file__).resolve().parents[2] / "train" / "main.py"
TILE_PX = 512
MOST_MIB, MOST_GROWTH = 2048, 1.2
# As `--minutes` chooses on a CPU.
FLAGS = ("--base_filters=16", "--tile_size=444", "--batch_size=2", "--augment", "--use_amp", "--optimizer=adam")


def write_stack(folder: Path, pages: int, side: int) -> None:
    """A labelled stack, uncompressed: a synthetic tile, repeated, another one on each page."""
    folder.mkdir()
    images, labels = synthetic_stack(slices=8, size=TILE_PX, seed=2)
    for name, tiles in (("volume", images), ("labels", labels)):
        stack = tifffile.memmap(
            folder / f"train-{name}.tif",
            shape=(pages, side, side),
            dtype=np.uint8,
            photometric="minisblack",
            bigtiff=True,
        )
        bands = [np.tile(tile, (1, -(-side // TILE_PX)))[:, :side] for tile in tiles]
        for page in range(pages):
            for row in range(0, side, TILE_PX):
                stack[page, row : row + TILE_PX] = bands[page % len(bands)][: side - row]
        stack.flush()


# What wait4 tells of a child counts the memory of the process that started it, too.
_SAYING_ITS_PEAK = """
import atexit, runpy, sys
atexit.register(lambda: print(next(row for row in open("/proc/self/status") if row.startswith("VmHWM"))))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def peak_mib(folder: Path, *flags: str) -> float:
    """Peak resident memory of a run of four steps on a folder's stack, in MiB, decoded slices in files included."""
    line = [sys.executable, "-c", _SAYING_ITS_PEAK, str(MAIN), "--exec_mode=train", *FLAGS, "--max_steps=4", *flags]
    line += [f"--data_dir={folder}", f"--model_dir={folder / 'result'}"]
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("VmHWM:", 1)[1].split()[0]) / 1024


def peak_of(folder: Path, pages: int, side: int, *flags: str) -> float:
    """Write a stack below a folder and train on it; the peak in MiB, which is also said."""
    room = os.statvfs(folder)
    if room.f_bavail * room.f_frsize < 5 * pages * side**2:
        pytest.skip(f"needs {5 * pages * side**2 / 1e9:.0f} GB of disk")
    stack = folder / f"{pages}x{side}"
    write_stack(stack, pages, side)
    peak = peak_mib(stack, *flags)
    shutil.rmtree(stack)
    say(f"{pages} slices of {side} x {side}: {peak:.0f} MiB")
    return peak


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_does_not_grow_with_the_number_of_slices(tmp_path: Path) -> None:
    few = peak_of(tmp_path, 30, 512)
    # As few slices for validation as with the 30: scoring takes long.
    many = peak_of(tmp_path, 2000, 512, "--validation_share=0.0015")
    assert many < MOST_MIB
    assert many < MOST_GROWTH * few
