"""The worker's processes and what they read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.measure.common import MeasureError
from unet.processes import child

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from serve.measure.peers.settings import PeersSettings

WORKER = Path(__file__).with_name("worker.py")


def prepare(folder: Path, settings: PeersSettings, tiles: npt.NDArray[np.uint8]) -> None:
    """Lay out what the workers read: tiles, the SavedModel, its weights, the ONNX graph and the artefacts."""
    (folder / "saved_model").symlink_to((settings.model_dir / "saved_model").resolve())
    (folder / "artefacts").symlink_to(settings.artefacts.resolve())
    (folder / "model.onnx").symlink_to((settings.artefacts / "model.onnx").resolve())
    np.save(folder / "tiles.npy", tiles)
    call_worker(sys.executable, "weights", folder, limit_s=settings.limit_s)


def call_worker(
    python: str,
    name: str,
    folder: Path,
    seconds: float = 0.0,
    batch_sizes: Sequence[int] = (),
    *,
    limit_s: float,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run one subject once.

    Args:
        python: the interpreter.
        name: of the subject.
        folder: what `prepare` laid out.
        seconds: for each batch size.
        batch_sizes: tiles in a call.
        limit_s: longest run.
        environment: changes to this process's environment.

    Raises:
        MeasureError: if it fails, with its last words, or takes too long.
    """
    log = folder / f"{name}.log"
    log.unlink(missing_ok=True)
    line = [python, str(WORKER), name, str(folder), str(seconds), *map(str, batch_sizes)]
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **(environment or {})}
    with child(line, log=log, environment=variables) as process:
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise MeasureError(f"it took more than {limit_s:g} s: raise --limit_s, or leave it out") from None
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if process.returncode < 0:
        raise MeasureError(f"it was killed by signal {-process.returncode}")
    if process.returncode != 0 or not said:
        raise MeasureError(said[-1] if said else f"it ended with exit code {process.returncode}")
    try:
        found: dict[str, Any] = json.loads(said[-1])
    except ValueError:
        raise MeasureError(f"it ended with these words instead of figures: {said[-1]}") from None
    return found


def tiles_of(data: Path | None, count: int, size: int) -> npt.NDArray[np.uint8]:
    """Tiles of real slices where there are some, else of the synthetic stack: uint8 [N, 1, S, S]."""
    if data is not None:
        from unet.volume import StackReader

        with StackReader(data) as reader:
            slices = [page for page, _ in zip(reader, range(count))]
        if slices[0].dtype != np.uint8:
            raise MeasureError(f"{data} is {slices[0].dtype}: name an 8-bit stack")
    else:
        from unet.phantom import synthetic_stack

        slices = list(synthetic_stack(slices=4, size=size, seed=0)[0])
    fill = [max(0, size - side) for side in slices[0].shape]
    padded = [np.pad(one, [(0, by) for by in fill], mode="reflect")[:size, :size] for one in slices]
    tiles: npt.NDArray[np.uint8] = np.stack([padded[index % len(padded)] for index in range(count)])[:, np.newaxis]
    return tiles
