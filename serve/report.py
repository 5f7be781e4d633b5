"""One page that shows what a model finds and how well and fast: ``python serve/report.py``, ``make report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from serve.measure.page.report import (
    THRESHOLDS,
    ReportError,
    card_section,
    page_json,
    score_section,
    slices_of,
    speed_section,
    write_report,
)
from unet.card import CARD_FILE
from unet.errors import command, say
from unet.scores import score_stack
from unet.volume import PROBABILITY_LIMITS, add_label_flags, label_options, open_volume, read_labels

if TYPE_CHECKING:
    from collections.abc import Sequence


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the report."""
    parser = argparse.ArgumentParser(prog="serve/report.py", description=__doc__)
    parser.add_argument("--images", type=Path, required=True, help="the stack that was segmented")
    parser.add_argument("--probability", type=Path, required=True, help="what the client wrote of it")
    parser.add_argument("--labels", type=Path, help="its labels, for the scores")
    add_label_flags(parser)
    parser.add_argument("--pages", default=":", help="slices FIRST:LAST to show and score, LAST left out")
    parser.add_argument("--benchmark", type=Path, help="benchmark.json of serve/benchmark.py")
    parser.add_argument("--artefacts", type=Path, help="folder with the model's card.json")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the overlay (default: %(default)g)")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    chosen = parser.parse_args(argv)
    slices = slices_of(chosen.images, chosen.probability, chosen.threshold, chosen.pages)
    sections = []
    if chosen.labels is not None:
        shown = [one["page"] for one in slices]
        labels = read_labels(chosen.labels, label_options(chosen))
        with open_volume(chosen.probability, PROBABILITY_LIMITS) as reader:
            if len(labels) != len(reader):
                raise ReportError(f"{chosen.labels} has {len(labels)} slices, {chosen.probability} {len(reader)}")
            proposal = np.stack([reader[page] for page in shown])
        scores = score_stack(proposal, labels[shown], THRESHOLDS)
        sections.append(score_section(scores, f"Slices {shown[0]} to {shown[-1]} of {chosen.images.name}."))
    if chosen.benchmark is not None:
        try:
            sections.append(speed_section(page_json(chosen.benchmark)))
        except (KeyError, TypeError, AttributeError) as error:
            raise ReportError(
                f"{chosen.benchmark} is not what serve/benchmark.py writes ({error!r}): measure again"
            ) from error
    if chosen.artefacts is not None:
        sections.append(card_section(page_json(chosen.artefacts / CARD_FILE)))
    write_report(chosen.out, f"Membranes in {chosen.images.name}", slices, sections)
    say(f"{chosen.out}: {len(slices)} slices, {chosen.out.stat().st_size / 2**20:.1f} MiB; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
