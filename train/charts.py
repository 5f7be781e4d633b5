"""Pictures of a run: how its loss fell, what its scores are at each threshold, and what it was shown."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from train.run.log import CURVE_NAME, read_log
from unet.files import atomic_file
from unet.volume.overlay import membrane_overlay

if TYPE_CHECKING:
    import numpy.typing as npt

    from train.input.dataset import Windows
    from train.scoring import Tally

_GAP_PX = 6
_COLOURS = {"v_rand": "tab:orange", "v_info": "tab:green", "dice": "tab:red"}


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def _figure() -> Any:
    """An empty figure, made without a window system or matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(7, 4), layout="constrained")


def learning_curve(model_dir: str | Path) -> Path | None:
    """Draw ``learning_curve.png`` beside a run's log; the picture, or None if the log has no loss yet."""
    figure = curve_figure(model_dir)
    if figure is None:
        return None
    path = Path(model_dir) / CURVE_NAME
    _save(figure, path)
    return path


def curve_figure(model_dir: str | Path) -> Any:
    """The loss and the validation scores over the steps, from a run's log; None if it has no loss yet."""
    points: dict[str, list[tuple[int, float]]] = {"loss": [], "v_rand": [], "v_info": [], "dice": []}
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
    left.set_ylabel("loss (nats a pixel)")
    left.set_ylim(bottom=0)
    if points["dice"]:
        right = left.twinx()
        for name, label, style in (
            ("v_rand", "V_rand", "o-"), ("v_info", "V_info", "s-"), ("dice", "Dice of the membrane", "^-"),
        ):  # fmt: skip
            right.plot(*zip(*points[name]), style, color=_COLOURS[name], label=f"{label}, validation slices")
        right.set_ylabel("score (1 is perfect)")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def threshold_curve(scores: Tally, threshold: float, path: Path) -> None:
    """Write V_rand thin and V_info thin at each threshold as ``path`` with the endings .csv and .png.

    Args:
        scores: of the slices that are reported.
        threshold: the one that was chosen before, on other slices.
        path: whose ending is replaced.
    """
    with atomic_file(path.with_suffix(".csv")) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["threshold", "v_rand_thin", "v_info_thin", "dice", "pixel_error"])
        writer.writerows(zip(scores.thresholds, scores.v_rand, scores.v_info, scores.dice, scores.pixel_error))
    figure = _figure()
    axes = figure.subplots()
    for name, values, style in (("V_rand", scores.v_rand, "o-"), ("V_info", scores.v_info, "s-")):
        axes.plot(scores.thresholds, values, style, label=f"{name} thin, at best {values.max():.4f}")
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold of the run, {threshold:g}")
    axes.set_xlabel('threshold on the probability of "not membrane"')
    axes.set_ylabel("score (1 is perfect)")
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
