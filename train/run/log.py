"""The record of a run: lines for people, JSON lines in the form of DLLogger for programs, and TensorBoard."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.errors import TrainError
from unet.errors import say
from unet.files import atomic_file, parse_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

LOG_NAME = "log.json"
BOARD_NAME = "tensorboard"
CURVE_NAME = "learning_curve.png"
_PREFIX = "DLLL "


class RunLog:
    """Writes ``log.json`` and ``tensorboard/`` in a run's folder, and says the same on standard output.

    Ranks other than the first get a log that is silent.
    """

    def __init__(self, model_dir: str | Path, *, active: bool) -> None:
        self._folder = Path(model_dir)
        self._active = active
        self._start = time.monotonic()
        self._board: Any = None

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
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / LOG_NAME).open("a", encoding="utf-8") as stream:
            stream.write(f"{_PREFIX}{json.dumps(record)}\n")
        say(text)
        if isinstance(step, int):
            import tensorflow as tf

            with self._writer().as_default(step):
                for name, value in data.items():
                    tf.summary.scalar(name, value)

    def picture(self, step: int, name: str, pixels: npt.NDArray[np.uint8]) -> None:
        """Show a picture, uint8 [H, W, 3], at ``step`` on TensorBoard."""
        if not self._active:
            return
        import tensorflow as tf

        with self._writer().as_default(step):
            tf.summary.image(name, pixels[np.newaxis])

    def rewind(self, step: int) -> None:
        """Forget what came after ``step``, from which a run is continued."""
        path = self._folder / LOG_NAME
        if not self._active or not path.exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        with atomic_file(path) as aside:
            aside.write_text("".join(line for line in lines if _is_until(line, step)), encoding="utf-8")

    def close(self) -> None:
        """Write out what TensorBoard still holds back."""
        if self._board is not None:
            self._board.close()

    def _writer(self) -> Any:
        import tensorflow as tf

        if self._board is None:
            self._board = tf.summary.create_file_writer(str(self._folder / BOARD_NAME))
        return self._board


def _is_until(line: str, step: int) -> bool:
    """Whether a line is whole and not of a step after ``step``."""
    try:
        at = parse_json(line[len(_PREFIX) :])["step"]
    except (ValueError, KeyError):
        return False
    return not (isinstance(at, int) and at > step)


def read_log(model_dir: str | Path) -> Iterator[tuple[int | str | list[Any], dict[str, Any]]]:
    """The (step, data) of each event in a run's folder; none where there is no log yet.

    Raises:
        TrainError: if a line is something else.
    """
    path = Path(model_dir) / LOG_NAME
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith("\n"):
                return  # is being written, or was when its writer was killed
            try:
                record = parse_json(line[len(_PREFIX) :])
                yield record["step"], record["data"]
            except (ValueError, KeyError, TypeError) as error:
                raise TrainError(
                    f"{path} is damaged in line {number}: --resume of the run repairs it, or take the line out"
                ) from error
