"""The one gate: what an artefact or an engine must pass before the card may list it.

Only `prove` makes a proof, the card takes nothing without one, and only what has a proof of its own is published.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from export.gate.parity import BFLOAT, Comparison, Tolerance, check_order, compare, worst
from unet.card.records import CPU, Proof
from unet.files import sha256_of
from unet.machine import instruction_sets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from export.gate.scoring import Judge
    from export.gate.tiles import Tiles

    Infer = Callable[[NDArray[np.uint8]], NDArray[np.float16]]
    Note = Callable[[str], None]

LARGEST_BATCH = 16
ONE_BY_ONE = "itself, one by one"


def _nothing() -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Step:
    """One file with what runs it: a thing to prove.

    Attributes:
        name: of the artefact, or of the engine that is to serve it.
        path: the file.
        infer: runs it, see `CpuEngine.infer`.
        tolerance: what it may change; from one batch size to another, and of the scores.
        parents: artefacts to compare it with, and what it may differ by: what it was made from, and those before.
        serves: whether it is to serve, so that it must be right at every batch size.
        device: what runs it, see `Proof.device`.
        others: comparisons of other quantities than the probability, made beforehand.
        facts: called last: what the runs told beside the outputs.
    """

    name: str
    path: Path
    infer: Infer
    tolerance: Tolerance
    parents: Mapping[str, Tolerance]
    serves: bool = False
    device: str = CPU
    others: tuple[Comparison, ...] = ()
    facts: Callable[[], dict[str, Any]] = _nothing


@dataclass(frozen=True)
class Batch:
    """Tiles of one size, no two the same.

    Attributes:
        tiles: uint8 [16, 1, S, S].
        due: what artefacts make of them, by name, float16 [16, 1, S - 184, S - 184]; where there is none, a step's
            batches are compared with its own answers to single tiles.
    """

    tiles: NDArray[np.uint8]
    due: Mapping[str, NDArray[np.float16]] = field(default_factory=dict)


@dataclass
class Evidence:
    """What steps are proven on, and what proven steps made of it.

    Attributes:
        tiles: run one by one.
        outputs: by artefact, of each batch of ``tiles``; grows with each artefact that is proven.
        batches: run in every batch size, by what is to serve.
        judge: scores held-out slices, where there are any with labels.
    """

    tiles: Tiles
    outputs: dict[str, list[NDArray[np.float16]]]
    batches: Sequence[Batch] = ()
    judge: Judge | None = None


def prove(step: Step, evidence: Evidence, note: Note) -> Proof:
    """Run a step on everything and compare; the step's own outputs join the evidence.

    Args:
        step: what to prove.
        evidence: what to run it on, with the outputs of its parents.
        note: takes each result in words.

    Returns:
        The proof, without which the card takes no record.

    Raises:
        ParityError: it does not compute what its parents do, mixes up its answers in some batch, loses too much of the
            scores, or gives NaN.
    """
    sha256 = sha256_of(step.path)
    rows = []
    for other in step.others:
        rows.append(other.check())
        note(str(other))
    found = [one_by_one(step.infer, batch) for batch in evidence.tiles.batches]
    for parent, tolerance in step.parents.items():
        rows.append(compare(step.name, parent, found, evidence.outputs[parent], tolerance))
        note(str(rows[-1].check()))
    if step.serves:
        for batch in evidence.batches:
            of_size = every_batch(step, batch)
            rows += of_size
            note("; ".join(map(str, of_size)))
    scores = None
    if evidence.judge is not None:
        change = evidence.judge.judge(step.name, step.infer, step.tolerance.score_ratio).check()
        note(str(change))
        scores = change.as_dict()
    facts = step.facts()
    evidence.outputs[step.name] = found
    return Proof(sha256, step.device, instruction_sets(), tuple(row.as_dict() for row in rows), scores, facts)


def every_batch(step: Step, batch: Batch) -> list[Comparison]:
    """A step on the first tiles of a batch, from one to all of them; the worst of each figure.

    Raises:
        ParityError: at some size it is not what is due, or an answer is another tile's.
    """
    tiles = batch.tiles
    due = batch.due or {ONE_BY_ONE: one_by_one(step.infer, tiles)}
    # The same arithmetic at every size: however coarse, it has no reason to differ from itself by more than bfloat16.
    allowed = dataclasses.replace(
        step.tolerance,
        max_difference=min(step.tolerance.max_difference, BFLOAT.max_difference),
        flipped_share=min(step.tolerance.flipped_share, BFLOAT.flipped_share),
    )
    rows: dict[str, list[Comparison]] = {name: [] for name in due}
    for size in range(1, len(tiles) + 1):
        found = step.infer(tiles[:size])
        for name, outputs in due.items():
            title = f"{step.name}, batch of {size} tiles of {tiles.shape[-1]}"
            rows[name].append(compare(title, name, [found], [outputs[:size]], allowed).check())
            check_order(title, found, outputs[:size])
    title = f"{step.name}, batches of 1 to {len(tiles)} tiles of {tiles.shape[-1]}"
    return [worst(title, comparisons) for comparisons in rows.values()]


def one_by_one(infer: Infer, batch: NDArray[np.uint8]) -> NDArray[np.float16]:
    """The outputs of a batch whose tiles are run singly: the memory is that of one."""
    return np.concatenate([infer(batch[index : index + 1]) for index in range(len(batch))])
