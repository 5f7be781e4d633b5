"""A network for a second tissue: from nothing, or from one that was trained on a first tissue (`make tissues`).

Both tissues are synthetic, so that anyone can repeat it. The second has smaller cells and thinner membranes, less
contrast, more noise and less sharpness, and a few annotated slices.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from tools.own_folder import clear_own
from tools.recipe import trainer_line
from train.config import FOLDS
from train.input.fitting import RECIPE
from train.input.split import fold_of
from train.run.folder import Run
from unet.errors import UnetError, command, say
from unet.files import write_json
from unet.machine import machine
from unet.measure import markdown
from unet.phantom import synthetic_stack
from unet.processes import child
from unet.scores import score_stack
from unet.volume import StackWriter, open_volume, read_labels

Stack = npt.NDArray[np.uint8]

_SIDE = 512
_FOLD = FOLDS - 1
_FLAGS = {
    **{name: "" if value is True else str(value) for name, value in RECIPE.items()},
    "base_filters": "8",
    "tile_size": "348",
    "crossvalidation_idx": str(_FOLD),
    "membrane_weight": "2",
}
_COLUMNS = ("v_rand_at_threshold", "v_info_at_threshold", "pixel_error", "threshold", "best_v_rand", "best_v_info")


class TissueError(UnetError):
    """A network of the comparison could not be trained or scored."""


@dataclass(frozen=True)
class Look:
    """How a tissue looks beside `unet.phantom`'s.

    Attributes:
        scale: of all sizes; the pixels become larger where it is below 1.
        contrast: of the intensities about their mean.
        brightness: added, in grey levels.
        blur_px: standard deviation of a Gaussian.
        noise: standard deviation of Gaussian noise, in grey levels.
    """

    scale: float = 1.0
    contrast: float = 1.0
    brightness: float = 0.0
    blur_px: float = 0.0
    noise: float = 0.0


FIRST = Look()
SECOND = Look(scale=0.75, contrast=0.6, brightness=25, blur_px=0.8, noise=12)


def tissue(slices: int, look: Look, seed: int, side: int = _SIDE) -> tuple[Stack, Stack]:
    """A synthetic stack of a look, and its labels: uint8 [slices, side, side] each; of labels 0 is membrane, 1 not.

    Args:
        slices: how many.
        look: of the images.
        seed: the same seed gives the same stack.
        side: rows and columns, in pixels.
    """
    images, labels = synthetic_stack(slices, round(side / look.scale), seed)
    rng = np.random.default_rng(seed)
    seen, truth = np.empty((slices, side, side), np.uint8), np.empty((slices, side, side), np.uint8)
    for page, (image, label) in enumerate(zip(images, labels)):
        plane = cv2.resize(image.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
        if look.blur_px > 0:
            plane = np.asarray(cv2.GaussianBlur(plane, (0, 0), look.blur_px), np.float32)
        plane = (plane - plane.mean()) * look.contrast + plane.mean() + look.brightness
        plane = plane + look.noise * rng.standard_normal(plane.shape, np.float32)
        seen[page] = np.rint(np.clip(plane, 0, 255)).astype(np.uint8)
        truth[page] = cv2.resize(label, (side, side), interpolation=cv2.INTER_NEAREST)
    return seen, truth


def write_tissue(folder: Path, slices: int, look: Look, seed: int) -> Path:
    """Write a tissue as the trainer wants it, the slices that training holds out as ``test-volume.tif`` too."""
    images, labels = tissue(slices, look, seed)
    held_out = list(fold_of(slices, _FOLD))
    return _write(folder, ("train", images, labels), ("test", images[held_out], labels[held_out]))


def write_real(folder: Path, data_dir: Path) -> Path | None:
    """Write the slices that training on real ones would hold out; None where there are none.

    Raises:
        StackError: if they cannot be read.
    """
    if not all((data_dir / f"train-{kind}.tif").exists() for kind in ("volume", "labels")):
        return None
    labels = read_labels(data_dir / "train-labels.tif")
    held_out = list(fold_of(len(labels), _FOLD))
    with open_volume(data_dir / "train-volume.tif") as volume:
        images = np.stack([volume[page] for page in held_out])
    return _write(folder, ("test", images, labels[held_out]))


def _write(folder: Path, *parts: tuple[str, Stack, Stack]) -> Path:
    folder.mkdir(parents=True)
    stacks = {f"{name}-volume.tif": images for name, images, _ in parts}
    stacks |= {f"{name}-labels.tif": labels * np.uint8(255) for name, _, labels in parts}
    for name, stack in stacks.items():
        with StackWriter(folder / name, None, np.uint8) as writer:
            for page in stack:
                writer.append(page)
    return folder


def train(data_dir: Path, model_dir: Path, flags: Mapping[str, str]) -> None:
    """Train in a process of its own.

    Raises:
        TissueError: if it fails.
    """
    _run([*trainer_line(data_dir, model_dir, {**_FLAGS, **flags})[1:]])


def scores_on(data_dir: Path, model_dir: Path) -> dict[str, Any]:
    """The scores of a run's network on a tissue's held-out slices, at the threshold that the run chose.

    Raises:
        TissueError: if the network cannot segment them.
    """
    _run(["train/main.py", "--exec_mode", "predict", "--data_dir", data_dir, "--model_dir", model_dir])
    with open_volume(model_dir / "eval" / "test-probability.tif") as found:
        probability = np.stack(list(found))
    labels = read_labels(data_dir / "test-labels.tif")
    return score_stack(probability, labels, threshold=Run(model_dir).threshold).as_dict()


def _run(words: Sequence[str | Path]) -> None:
    line = [sys.executable, *map(str, words)]
    with child(line) as process:
        process.wait()
    if process.returncode:
        raise TissueError(f"{' '.join(line[1:])} failed: its own sentence is above")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train the three networks, score them on both tissues, print a table."""
    parser = argparse.ArgumentParser(prog="python -m tools.tissues", description=str(__doc__).partition(".\n")[0])
    parser.add_argument("--out", type=Path, default=Path("tissues"), help="folder for all; a former one is replaced")
    parser.add_argument(
        "--data_dir", type=Path, default=Path("data"), help="real slices, scored too where there are any"
    )
    parser.add_argument("--first_steps", type=int, default=1600, help="on the first tissue (default: 1600)")
    parser.add_argument("--steps", type=int, default=1000, help="on the second tissue, from nothing (default: 1000)")
    parser.add_argument("--tuning_steps", type=int, default=200, help="on it, from the first network (default: 200)")
    chosen = parser.parse_args(argv)
    clear_own(chosen.out, "tissues", TissueError)
    first = write_tissue(chosen.out / "first-tissue", 30, FIRST, seed=0)
    second = write_tissue(chosen.out / "second-tissue", 14, SECOND, seed=100)
    runs = {name: chosen.out / name for name in ("first", "nothing", "tuned")}
    train(first, runs["first"], {"max_steps": str(chosen.first_steps)})
    train(second, runs["nothing"], {"max_steps": str(chosen.steps)})
    tuning = {"max_steps": str(chosen.tuning_steps), "init_from": str(runs["first"])}
    train(second, runs["tuned"], tuning)
    rows = {
        "first tissue: its own network": scores_on(first, runs["first"]),
        "second tissue: the first one's network as it is": scores_on(second, runs["first"]),
        f"second tissue: {chosen.steps} steps from nothing": scores_on(second, runs["nothing"]),
        f"second tissue: {chosen.tuning_steps} steps from the first one's network": scores_on(second, runs["tuned"]),
        "first tissue: the second one's network as it is": scores_on(first, runs["nothing"]),
    }
    if real := write_real(chosen.out / "real-tissue", chosen.data_dir):
        names = {"first": "first one's", "nothing": "second one's", "tuned": "network of both"}
        rows |= {f"real slices: the {name} as it is": scores_on(real, runs[run]) for run, name in names.items()}
    write_json(chosen.out / "tissues.json", rows)
    say(f"held-out slices, at the threshold that each run chose; {machine()}")
    titles = ["", "V_rand", "V_info", "pixel error", "threshold", "V_rand, best threshold", "V_info, best threshold"]
    say(markdown(titles, [[name, *(f"{row[key]:.4f}" for key in _COLUMNS)] for name, row in rows.items()]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
