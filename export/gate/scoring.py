"""The gate in the task's own terms: the scores of whole held-out slices, before and after a step.

A small difference of probabilities can open a membrane and merge two cells. If there are labels of slices that training
did not see, a step must also keep V_rand and V_info.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from export.errors import ParityError
from unet.files import atomic_file
from unet.geometry import TilePlan, cheapest_tile_size, plan_tiles, predict_tiled
from unet.intensity import find_windows
from unet.names import DEFAULT_THRESHOLD
from unet.scores import StackScores, score_stack
from unet.volume import labels_of, open_volume, read_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from export.gate.tiles import Source

MOST_SLICES = 6
_GAP_PX = 8


@dataclass(frozen=True)
class Change:
    """What a step makes of the scores.

    Attributes:
        step: what was scored.
        against: the artefact whose scores it should keep.
        v_rand: V_rand thin at its best threshold, after the step.
        v_info: V_info thin, likewise.
        ratio: the smaller of both scores' ratios to those of ``against``.
        least: the smallest ratio that is accepted.
        threshold: that training chose, which clients cut at.
        at_threshold: the smaller of both scores' ratios there. It is shown and decides nothing: where cells are about
            to merge, a single pixel moves it more than the network's quality does.
    """

    step: str
    against: str
    v_rand: float
    v_info: float
    ratio: float
    least: float
    threshold: float
    at_threshold: float

    def check(self) -> Change:
        """Itself, where accepted.

        Raises:
            ParityError: naming step, figure and bound.
        """
        if not self.ratio >= self.least:
            raise ParityError(
                f"{self.step} keeps only {self.ratio:.4f} of {self.against}'s V_rand or V_info on the held-out slices, "
                f"{self.least:g} is the least accepted"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """The change as the card keeps it."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.step} on the held-out slices: V_rand thin {self.v_rand:.4f}, V_info thin {self.v_info:.4f}, "
            f"{self.ratio:.4f} of those of {self.against} (accepted: {self.least:g}); at the threshold "
            f"{self.threshold:g} {self.at_threshold:.4f}"
        )


@dataclass(frozen=True)
class ScoredSlices:
    """Whole slices with their labels.

    Attributes:
        images: uint8 [n, H, W].
        labels: uint8 [n, H, W], 0 membrane, 1 not, 255 not annotated.
        tile_size: that the slices are cut into.
        threshold: that clients cut at.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    tile_size: int
    threshold: float = DEFAULT_THRESHOLD

    @property
    def plan(self) -> TilePlan:
        """How each slice is covered."""
        height, width = self.images.shape[1:]
        return plan_tiles(height, width, self.tile_size)

    def tiles(self) -> list[NDArray[np.uint8]]:
        """The tiles of each slice, uint8 [T, 1, S, S]."""
        plan = self.plan
        found: list[NDArray[Any]] = [
            np.stack([plan.extract(image, tile) for tile in plan.tiles]) for image in self.images
        ]
        return [tiles[:, np.newaxis] for tiles in found]

    def assemble(self, outputs: Sequence[NDArray[np.float16]]) -> NDArray[np.float32]:
        """Slices, float32 [n, H, W], out of the probabilities of their tiles, [T, 1, S - 184, S - 184] each."""
        plan = self.plan
        whole = np.empty(self.images.shape, np.float32)
        for result, output in zip(whole, outputs):
            for tile, part in zip(plan.tiles, output):
                plan.place(part[0], tile, result)
        return whole

    def predict(self, infer: Callable[[NDArray[np.uint8]], NDArray[np.float16]]) -> NDArray[np.float32]:
        """The slices' probabilities, float32 [n, H, W], by a function of tiles, [N, 1, S, S]."""
        plan = self.plan

        def planes(tiles: NDArray[Any]) -> NDArray[Any]:
            return infer(tiles[:, np.newaxis])[:, 0]

        return np.stack([predict_tiled(image, plan, planes).astype(np.float32) for image in self.images])


@dataclass(frozen=True)
class Judge:
    """Scores steps against an artefact that is proven, or the SavedModel.

    Attributes:
        slices: what is scored.
        expected: that artefact's probabilities of them, float32 [n, H, W].
        before: their scores.
        against: the artefact's name.
    """

    slices: ScoredSlices
    expected: NDArray[np.float32]
    before: StackScores
    against: str

    @classmethod
    def of(cls, slices: ScoredSlices, expected: NDArray[np.float32], against: str) -> Judge:
        """With the artefact's scores."""
        return cls(slices, expected, score_stack(expected, slices.labels, threshold=slices.threshold), against)

    def judge(self, step: str, infer: Callable[[NDArray[np.uint8]], NDArray[np.float16]], least: float) -> Change:
        """Score a step; not yet checked."""
        threshold = self.slices.threshold
        after = score_stack(self.slices.predict(infer), self.slices.labels, threshold=threshold)

        def kept(*names: str) -> float:
            return min(float(getattr(after, name) / (getattr(self.before, name) or 1.0)) for name in names)

        ratio, there = kept("best_v_rand", "best_v_info"), kept("v_rand_at_threshold", "v_info_at_threshold")
        return Change(step, self.against, after.best_v_rand, after.best_v_info, ratio, least, threshold, there)

    def worst_slice_png(self, path: Path, infer: Callable[[NDArray[np.uint8]], NDArray[np.float16]]) -> float:
        """Write the slice where an engine differs most: image, what is due, engine, and ten times their difference.

        Returns:
            The mean absolute difference of that slice.
        """
        from PIL import Image

        found = self.slices.predict(infer)
        differences = np.abs(found - self.expected)
        worst = int(differences.mean(axis=(1, 2)).argmax())
        planes = [self.expected[worst], found[worst], np.minimum(10 * differences[worst], 1)]
        panels = [self.slices.images[worst], *(np.asarray(np.rint(plane * 255), np.uint8) for plane in planes)]
        gap = np.full((panels[0].shape[0], _GAP_PX), 255, np.uint8)
        row = [part for panel in panels for part in (panel, gap)][:-1]
        with atomic_file(path) as aside:
            Image.fromarray(np.concatenate(row, axis=1)).save(aside, format="PNG")
        return float(differences[worst].mean())


def gather_scored(source: Source, tile_sizes: Sequence[int]) -> ScoredSlices | None:
    """The labelled slices that training did not see, at most six; None where there are none.

    Args:
        source: the training stacks.
        tile_sizes: that will be served.

    Raises:
        StackError: a stack cannot be read.
    """
    for name, pages in source.held_out.items():
        stack = None if source.data_dir is None else source.data_dir / name
        if stack is None or not pages or not stack.exists():
            continue
        labels_path = labels_of(stack)
        if labels_path is None:
            continue
        labels = read_labels(labels_path, source.labels)
        with open_volume(stack) as reader:
            chosen = [page for page in pages if page < min(len(reader), len(labels))][:MOST_SLICES]
            # A slice that is all membrane has no cells to score.
            chosen = [page for page in chosen if (labels[page] == 1).any()]
            windows = find_windows(reader, source.window)
            images = [windows.apply(page, reader[page]) for page in chosen]
        if images:
            size = cheapest_tile_size(images[0].shape[0], images[0].shape[1], tuple(tile_sizes))
            return ScoredSlices(np.stack(images), labels[chosen], size, source.threshold)
    return None
