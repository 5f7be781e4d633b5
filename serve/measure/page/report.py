"""One page that shows what a model finds and how well and fast: ``python serve/report.py``, ``make report``."""

from __future__ import annotations

import html
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.measure.common import MeasureError
from serve.measure.page.charts import SCORE_AXES, score_chart, speed_charts
from serve.measure.page.slices import slices_of, stack_scores, truth_of
from unet.card import CARD_FILE
from unet.config import setting
from unet.files import atomic_file, read_json
from unet.files.demo import DEMO
from unet.names import DEFAULT_THRESHOLD
from unet.page import table
from unet.scores.truth import MERGE_AND_SPLIT_RULE
from unet.volume import read_labels
from unet.volume.overlay import MEMBRANE_COLOUR, OPACITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unet.scores import StackScores
    from unet.volume import LabelOptions

PAGE = Path(__file__).resolve().parent / "page.html"
# What `make demo` leaves for a report.
_DEMO_FILES = {
    "images": DEMO / "held-out-volume.tif",
    "probability": DEMO / "held-out-volume-probability.tif",
    "labels": DEMO / "held-out-labels.tif",
    "benchmark": DEMO / "benchmark" / "benchmark.json",
    "artefacts": DEMO / "artefacts",
}


@dataclass(frozen=True)
class ReportSettings:
    """What the page shows."""

    images: Path | None = setting(None, "the stack that was segmented; without one, what the demo made", kind=Path)
    probability: Path | None = setting(None, "what the client wrote of it", kind=Path)
    labels: Path | None = setting(None, "its labels, for scores, merges and splits", kind=Path)
    pages: str = setting(":", "slices FIRST:LAST to show and score, LAST left out")
    benchmark: Path | None = setting(None, "benchmark.json of serve/benchmark.py", kind=Path)
    artefacts: Path | None = setting(None, "folder with the model's card.json", kind=Path)
    threshold: float | None = setting(
        None, "of the membrane, to begin with; None: what the model's training chose, or 0.5", kind=float
    )
    out: Path = setting(Path("report.html"), "the page")

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise MeasureError(f"--threshold is {self.threshold:g}; it must be 0 to 1")

    def or_demo(self) -> ReportSettings:
        """These settings; where no stack is named, those for what ``make demo`` made.

        Raises:
            MeasureError: there is nothing to show.
        """
        if self.images is not None and self.probability is not None:
            return self
        if self.images is not None or self.probability is not None:
            raise MeasureError("--images and --probability go together: name both")
        if not all(_DEMO_FILES[name].exists() for name in ("images", "probability")):
            raise MeasureError("no stack to show: name --images and --probability, or run `make demo` first")
        there = {name: path for name, path in _DEMO_FILES.items() if path.exists() and getattr(self, name) is None}
        return replace(self, **there)  # type: ignore[arg-type]


def make_report(settings: ReportSettings, options: LabelOptions) -> int:
    """Write the page, whole or not at all; it needs nothing but a browser.

    Args:
        settings: what it shows; a stack is named.
        options: how the labels are understood.

    Returns:
        How many slices it shows.

    Raises:
        UnetError: something that is named cannot be read, or does not fit the rest.
    """
    assert settings.images is not None
    assert settings.probability is not None
    found = list(slices_of(settings.images, settings.probability, settings.pages))
    slices = [{"page": page, **views} for page, views, _ in found]
    sections, card = [], {} if settings.artefacts is None else page_json(settings.artefacts / CARD_FILE)
    threshold = settings.threshold
    if threshold is None:
        threshold = float(card.get("model", {}).get("threshold", DEFAULT_THRESHOLD))
    if settings.labels is not None:
        labels = read_labels(settings.labels, options)
        shown = [page for page, _, _ in found]
        if len(labels) <= shown[-1] or labels.shape[1:] != found[0][2].shape:
            raise MeasureError(f"{settings.labels} is {labels.shape}: it is not of {settings.images}")
        each, whole = stack_scores(np.stack([probability for _, _, probability in found]), labels[shown], threshold)
        for (page, _, probability), view, scores in zip(found, slices, each):
            view.update(truth_of(probability, labels[page]), chart=score_chart(f"slice {page}", scores, whole))
        sections.append(score_section(whole, f"Slices {shown[0]} to {shown[-1]} of {settings.images.name}."))
    if settings.benchmark is not None:
        sections.append(speed_section(settings.benchmark))
    if card:
        sections.append(card_section(card))
    _write(settings, slices, sections, threshold)
    return len(slices)


def _write(settings: ReportSettings, slices: list[dict[str, Any]], sections: Sequence[str], threshold: float) -> None:
    assert settings.images is not None
    facts = {"threshold": threshold, "colour": MEMBRANE_COLOUR, "opacity": OPACITY, "axes": SCORE_AXES}
    parts = {
        "@TITLE@": html.escape(f"Membranes in {settings.images.name}"),
        "@SECTIONS@": "\n".join(sections),
        # "</" must not occur in a script element.
        "@FACTS@": json.dumps(facts).replace("</", "<\\/"),
        "@SLICES@": json.dumps(slices).replace("</", "<\\/"),
    }
    page = PAGE.read_text(encoding="utf-8")
    for mark, text in parts.items():
        page = page.replace(mark, text)
    with atomic_file(settings.out) as aside:
        aside.write_text(page, encoding="utf-8")


def score_section(scores: StackScores, described: str) -> str:
    """Table of a stack's scores, and the place of the chart that follows the slice."""
    rows = {
        f"V_rand after thinning, at {scores.threshold:g}": f"{scores.v_rand_at_threshold:.4f}",
        f"V_info after thinning, at {scores.threshold:g}": f"{scores.v_info_at_threshold:.4f}",
        "Dice of the membrane": f"{scores.dice:.4f}",
        "pixel error": f"{scores.pixel_error:.4f}",
        "V_rand, the best of these slices": f"{scores.best_v_rand:.4f} at {scores.best_v_rand_threshold:g}",
        "V_info, the best of these slices": f"{scores.best_v_info:.4f} at {scores.best_v_info_threshold:g}",
    }
    chart = '<div class="chart"><img id="scores" alt="scores over the threshold"><div id="cursor"></div></div>'
    return (
        f"<h2>Scores</h2><p>{html.escape(described)} The line in the chart is the threshold above.</p>"
        f"<div class='side'><div>{table(rows)}<p class='rule'>{MERGE_AND_SPLIT_RULE}</p></div>{chart}</div>"
    )


def speed_section(path: Path) -> str:
    """Throughput and latency of ``serve/benchmark.py``'s JSON, as charts.

    Raises:
        MeasureError: the file is something else.
    """
    try:
        side, charts = speed_charts(page_json(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise MeasureError(f"{path} is not what serve/benchmark.py writes ({error!r}): measure again") from error
    if not charts:
        return "<h2>Speed</h2><p>Something else was running: no row of the benchmark can be relied on.</p>"
    pictures = "".join(f'<div class="chart"><img class="speed" src="{one}" alt="speed"></div>' for one in charts)
    return f"<h2>Speed</h2><p>Images of {side} x {side}, one request at a time.</p><div class='side'>{pictures}</div>"


def card_section(card: dict[str, Any]) -> str:
    """What the model is made of."""
    facts = {name: value for name, value in card.get("model", {}).items() if isinstance(value, (str, int, float))}
    engine = card.get("engine") or {}
    facts["tile sizes"] = ", ".join(str(size) for size in card.get("tile_sizes", []))
    if engine:
        facts["engine"] = f"{engine['kind']} {engine['precision']}"
    made = {
        f"{name} ({entry['file']})": f"{entry['sha256'][:12]}, {entry['created']}, by {entry['command']}"
        for name, entry in card.get("artefacts", {}).items()
    }
    return f"<h2>Card</h2>{table(facts)}{table(made)}"


def page_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        MeasureError: it cannot be read.
    """
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise MeasureError(f"{path} does not exist: make it first, or leave its flag away") from error
    except ValueError as error:
        raise MeasureError(f"{path} is not JSON: make it again") from error
