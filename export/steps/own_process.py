"""Steps that need TensorFlow run in processes of their own: it gives its gigabytes back only when it ends."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from export.errors import ExportError
from unet.processes import child


def in_own_process(folder: Path, module: str, *arguments: Path | int) -> None:
    """Run a step that needs TensorFlow, which gives its gigabytes back to the system only when it ends.

    Raises:
        ExportError: with the step's own last words.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        log = Path(name) / "log"
        with child([sys.executable, "-m", module, *map(str, arguments)], log=log) as process:
            process.wait()
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if process.returncode != 0:
        last = said[-1] if said else f"it ended with exit code {process.returncode}"
        raise ExportError(last[len("error: ") :] if last.startswith("error: ") else f"{module} failed: {last}")
