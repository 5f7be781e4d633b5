"""The record of a run: lines for people and, in the form of DLLogger, JSON lines for programs."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from unet.errors import say


class RunLog:
    """Writes ``log.json`` in a run's folder, one event a line, and says the same on standard output.

    Ranks other than the first get a log that is silent.
    """

    def __init__(self, model_dir: str | Path, *, active: bool) -> None:
        self._path = Path(model_dir) / "log.json"
        self._active = active
        self._start = time.monotonic()
        if active:
            self._path.parent.mkdir(parents=True, exist_ok=True)

    def event(self, step: int | str, text: str, **data: Any) -> None:
        """Record ``data`` at ``step`` ("PARAMETER" and "SUMMARY" stand for the run's start and end)."""
        if not self._active:
            return
        now = datetime.now().astimezone()
        record: dict[str, Any] = {
            "timestamp": str(now.timestamp()),
            "elapsedtime": f"{time.monotonic() - self._start:.6f}",
            "datetime": now.isoformat(sep=" "),
            "type": "LOG",
            "step": [] if step == "SUMMARY" else step,
            "data": data,
        }
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(f"DLLL {json.dumps(record)}\n")
        say(text)
