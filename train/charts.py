"""Pictures of a run: how its loss fell, what its scores are at each threshold, and what it was shown."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.log import read_log
from unet.files import atomic_file
from unet.volume.overlay import membrane_overlay

if TYPE_CHECKING:
    import numpy.typing as npt

    from train.input.dataset import Windows
    from unet.scores import StackScores

_GAP_PX = 6


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def _figure() -> Any:
    """An empty figure, made without a window system or matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4), layout="constrained")


def learning_curve(model_dir: str | Path) -> Path | None:
    """Draw the loss and the held-out Dice over the steps, from a run's log, as ``learning_curve.png`` beside it.

    Returns:
        The picture, or None where the log has no loss yet.
    """
    points: dict[str, list[tuple[int, float]]] = {"loss": [], "dice": []}
    for step, data in read_log(model_dir):
        for name in points.keys() & data.keys():
            if isinstance(step, int):
                points[name].append((step, data[name]))
    if not points["loss"]:
        return None
    figure = _figure()
    left = figure.subplots()
    left.plot(*zip(*points["loss"]), color="tab:blue", label="training loss, mean since the point before")
    left.set_xlabel("step")
    left.set_ylabel("loss")
    left.set_ylim(bottom=0)
    if points["dice"]:
        right = left.twinx()
        right.plot(*zip(*points["dice"]), "o-", color="tab:red", label="held-out Dice of the membrane")
        right.set_ylabel("Dice")
    figure.legend(loc="outside upper center", ncols=2)
    path = Path(model_dir) / "learning_curve.png"
    _save(figure, path)
    return path


def threshold_curve(scores: StackScores, path: Path) -> None:
    """Write V_rand thin and V_info thin at each threshold as ``path`` with the endings .csv and .png."""
    with atomic_file(path.with_suffix(".csv")) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["threshold", "v_rand_thin", "v_info_thin"])
        writer.writerows(zip(scores.thresholds, scores.v_rand, scores.v_info))
    figure = _figure()
    axes = figure.subplots()
    axes.plot(scores.thresholds, scores.v_rand, "o-", label=f"V_rand thin, at best {scores.best_v_rand:.4f}")
    axes.plot(scores.thresholds, scores.v_info, "s-", label=f"V_info thin, at best {scores.best_v_info:.4f}")
    axes.set_xlabel('threshold on the probability of "not membrane"')
    axes.set_ylabel("score")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center")
    _save(figure, path.with_suffix(".png"))


def augmentation_sheet(windows: Windows, path: Path, rows: int = 4, columns: int = 6) -> None:
    """Write a picture of the first training windows: the image, and its label's membrane where the loss sees it.

    Args:
        windows: the stream of windows.
        path: PNG file.
        rows: of windows.
        columns: of windows.
    """
    from PIL import Image

    pitch = windows.size + _GAP_PX
    sheet: npt.NDArray[np.uint8] = np.full((rows * pitch - _GAP_PX, columns * pitch - _GAP_PX, 3), 255, np.uint8)
    for number in range(rows * columns):
        image, label, _ = windows.window(number)
        grey = np.asarray(np.rint((image[..., 0] + 1) * 127.5), np.uint8)
        margin = (windows.size - len(label)) // 2
        drawn = membrane_overlay(grey, np.pad(label, margin, constant_values=1))
        # A line around what the label covers.
        drawn[margin : -margin or None, [margin, -margin - 1]] = 255
        drawn[[margin, -margin - 1], margin : -margin or None] = 255
        top, left = (pitch * place for place in divmod(number, columns))
        sheet[top : top + windows.size, left : left + windows.size] = drawn
    with atomic_file(path) as aside:
        picture = Image.fromarray(sheet)
        picture.thumbnail((2400, 2400))
        picture.save(aside, format="PNG")
