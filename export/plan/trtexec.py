"""The ``trtexec`` command that builds a TensorRT plan on the machine that will run it, as `build_plan` does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.record.provenance import shell
from unet.engine.targets import TARGETS
from unet.files import atomic_file
from unet.names import HALF_FILE, INPUT

if TYPE_CHECKING:
    from pathlib import Path

    from export.plan.settings import BuildSettings

SCRIPT = "build_plan.sh"
# What trtexec leaves, unproven and not on the card.
UNPROVEN = "trtexec.plan"


def plan_command(model: str, plan: str, settings: BuildSettings) -> str:
    """The command for TensorRT 10, with the same settings as the build through Python.

    Args:
        model: the float16 ONNX file.
        plan: the plan to write.
        settings: how.
    """
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={plan}", "--stronglyTyped", "--skipInference"]
    words += [f"--builderOptimizationLevel={settings.optimization_level}", "--profilingVerbosity=detailed"]
    words.append(f"--memPoolSize=workspace:{settings.workspace_bytes >> 20}")
    for number, profile in enumerate(settings.profiles):
        words.append(f"--profile={number}")
        for kind, shape in zip(("min", "opt", "max"), profile.shapes):
            words.append(f"--{kind}Shapes={INPUT}:{'x'.join(map(str, shape))}")
    return shell(*words)


def write_script(folder: Path, settings: BuildSettings, target: str) -> Path:
    """Write the command as a script into ``folder``; returns its path."""
    path = folder / SCRIPT
    adopt = shell("python", "-m", "export.plan.build", "--artefacts", ".", "--target", target, "--adopt", UNPROVEN)
    text = (
        "#!/bin/sh\n"
        f"# Builds {UNPROVEN} beside this script, with the settings of python -m export.plan.build.\n"
        "# Run it on the machine that will serve: a plan fits only the GPU and the TensorRT that built it, here\n"
        f"# TensorRT {TARGETS[target].tensorrt}. Then prove it and enter it on the card:\n"
        f"#   {adopt}\n"
        "set -eu\n"
        'cd "$(dirname "$0")"\n'
        f"exec {plan_command(HALF_FILE, UNPROVEN, settings)}\n"
    )
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")
        aside.chmod(0o700)
    return path
