"""Prints scores: ``python -m unet.scores``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from unet.errors import UnetError, command, say
from unet.scores.agglomeration import check_limit
from unet.scores.slices import score_agglomerated, score_stack
from unet.scores.volumes import score_volumes
from unet.volume import (
    LABEL_LIMITS,
    PROBABILITY_LIMITS,
    add_label_flags,
    label_options,
    open_volume,
    page_range,
    read_labels,
)
from unet.volume.overlay import noted_threshold

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unet.scores.slices import StackScores
    from unet.scores.volumes import VolumeScores


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the scores of a probability stack, or of a volume of cells."""
    parser = argparse.ArgumentParser(
        prog="unet.scores", description="Score a probability stack as ISBI 2012 did, or a volume of cells as CREMI did."
    )
    parser.add_argument(
        "proposal", type=Path, help="stack of non-membrane probabilities in [0, 1]; with --volume ids of segments"
    )
    parser.add_argument("labels", type=Path, help="stack of labels: masks of two values, or ids of cells")
    parser.add_argument(
        "--volume",
        action="store_true",
        help="compare ids of segments with ids of cells in 3-D; voxels whose true id is --ignore_label (default: 0) "
        "do not count",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="that was chosen before, on other slices; membrane is not above it (default: the one in the tag that the "
        "client writes, which is the network's own, or 0.5)",
    )
    parser.add_argument(
        "--agglomerate",
        type=float,
        help="score the cells of `serve/client.py --output labels --agglomerate` too, at this limit and the threshold",
    )
    add_label_flags(parser)
    parser.add_argument("--pages", default=":", help="slices FIRST:LAST to score, LAST left out (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the slices")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    chosen = parser.parse_args(argv)
    pages, scores, cells = _volume_scores(chosen) if chosen.volume else _stack_scores(chosen)
    if chosen.json:
        say(json.dumps({**scores.as_dict(), **cells}))
        return 0
    say(f"{len(pages)} slices: {scores}")
    if cells:
        say(
            f"cells agglomerated below {chosen.agglomerate:g}, at that threshold: V_rand thin "
            f"{cells['agglomerated_v_rand']:.4f}, V_info thin {cells['agglomerated_v_info']:.4f}"
        )
    return 0


def _stack_scores(chosen: argparse.Namespace) -> tuple[range, StackScores, dict[str, float]]:
    threshold = noted_threshold(chosen.proposal) if chosen.threshold is None else chosen.threshold
    if not 0 <= threshold <= 1:
        raise UnetError(f"--threshold is {threshold:g}; it must be from 0 to 1")
    labels = read_labels(chosen.labels, label_options(chosen))
    with open_volume(chosen.proposal, PROBABILITY_LIMITS) as reader:
        scale = 1.0 if reader.dtype.kind == "f" else float(np.iinfo(reader.dtype).max)
        probability = np.stack([page / np.float32(scale) for page in reader])
    if probability.shape != labels.shape:
        raise UnetError(f"{chosen.proposal} is {probability.shape} but {chosen.labels} is {labels.shape}")
    pages = page_range(chosen.pages, len(labels))
    probability, labels = probability[pages], labels[pages]
    scores = score_stack(probability, labels, jobs=chosen.jobs, threshold=threshold)
    if chosen.agglomerate is None:
        return pages, scores, {}
    check_limit(threshold, chosen.agglomerate)
    v_rand, v_info = score_agglomerated(probability, labels, threshold, chosen.agglomerate)
    return pages, scores, {"agglomerated_v_rand": v_rand, "agglomerated_v_info": v_info}


def _volume_scores(chosen: argparse.Namespace) -> tuple[range, VolumeScores, dict[str, float]]:
    if chosen.agglomerate is not None:
        raise UnetError("--agglomerate makes cells of probabilities in slices: leave it out with --volume")
    if chosen.membrane_value is not None or chosen.membrane_width:
        raise UnetError("--membrane_value and --membrane_width are for membranes: leave them out with --volume")
    ignored = 0 if chosen.ignore_label is None else chosen.ignore_label
    with open_volume(chosen.labels, LABEL_LIMITS) as truth, open_volume(chosen.proposal, LABEL_LIMITS) as segments:
        pages = page_range(chosen.pages, truth.pages)
        return pages, score_volumes(truth, segments, pages, ignored), {}


if __name__ == "__main__":
    sys.exit(main())
