"""The ``trtexec`` command that builds a TensorRT plan on the machine that will run it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.provenance import shell
from unet.files import atomic_file
from unet.names import INPUT, PLAN_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

SCRIPT = "build_plan.sh"
BATCHES = (1, 8, 16)


def plan_command(model: str, plan: str, tile_sizes: Sequence[int], batches: Sequence[int] = BATCHES) -> str:
    """The command for TensorRT 10: one optimization profile per tile size, from the least to the largest batch.

    Args:
        model: the float16 ONNX file.
        plan: the plan to write.
        tile_sizes: sides of the tiles.
        batches: least, usual and largest batch.
    """
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={plan}", "--stronglyTyped", "--skipInference"]
    for profile, size in enumerate(tile_sizes):
        words.append(f"--profile={profile}")
        words += [
            f"--{kind}Shapes={INPUT}:{batch}x1x{size}x{size}" for kind, batch in zip(("min", "opt", "max"), batches)
        ]
    return shell(*words)


def write_script(folder: Path, model: str, tile_sizes: Sequence[int]) -> Path:
    """Write the command as a script into ``folder``; returns its path."""
    path = folder / SCRIPT
    text = (
        "#!/bin/sh\n"
        f"# Builds {PLAN_FILE} beside this script, as python -m export.plan.build does.\n"
        "# Run it on the machine that will serve:\n"
        "# a plan fits only the GPU and the TensorRT that built it. TensorRT 10.4 is the last release for a V100.\n"
        "set -eu\n"
        'cd "$(dirname "$0")"\n'
        f"exec {plan_command(model, PLAN_FILE, tile_sizes)}\n"
    )
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o700)
    return path
