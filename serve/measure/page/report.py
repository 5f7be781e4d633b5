"""One page that shows what a model finds and how well and fast: ``python serve/report.py``, ``make report``."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.measure.rows import lone_rows
from unet.errors import UnetError
from unet.files import atomic_file
from unet.intensity import find_windows
from unet.volume import PROBABILITY_LIMITS, open_volume, page_range
from unet.volume.overlay import membrane_overlay, shrink, shrink_factor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unet.scores import StackScores

THRESHOLDS = tuple(step / 10 for step in range(11))
_JPEG_QUALITY = 85
PAGE = Path(__file__).resolve().parent / "page.html"
_COLOURS = ("#0b6e4f", "#c1440e", "#31508c")


class ReportError(UnetError):
    """A report that cannot be made of what is there."""


def picture(pixels: npt.NDArray[np.uint8]) -> str:
    """An image, grey [H, W] or RGB [H, W, 3], as a data address that a page can hold."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def slices_of(
    images: str | Path, probabilities: str | Path, threshold: float, pages: str = ":"
) -> list[dict[str, Any]]:
    """Input, probability and overlay of each slice as pictures.

    Args:
        images: the stack that was segmented.
        probabilities: what the client wrote of it.
        threshold: of the overlay.
        pages: which slices, as FIRST:LAST; all by default.

    Raises:
        StackError: if either cannot be read.
        ReportError: if they do not fit each other.
    """
    with open_volume(Path(images)) as volume, open_volume(probabilities, PROBABILITY_LIMITS) as found:
        if (len(volume), volume.height, volume.width) != (len(found), found.height, found.width):
            raise ReportError(f"{probabilities} is not of {images}: segment it again")
        windows = find_windows(volume)
        shown = []
        for page in page_range(pages, len(found)):
            image = windows.apply(page, volume[page])
            image, probability = shrink(image, found[page], shrink_factor(*image.shape))
            grey = np.asarray(np.rint(probability * 255), np.uint8)
            overlay = membrane_overlay(image, probability, threshold)
            views = {"input": image, "probability": grey, "overlay": overlay}
            shown.append({"page": page, **{name: picture(pixels) for name, pixels in views.items()}})
    return shown


def chart(title: str, x: Sequence[str], series: Mapping[str, Sequence[float]], unit: str) -> str:
    """Lines over equally spaced places, as SVG; every point bears its value as a tooltip."""
    left, top, width, height = 54, 30, 415, 190
    values = [value for line in series.values() for value in line]
    span = max(values) or 1
    place = [left + width * (index + 0.5) / len(x) for index in range(len(x))]
    parts = [f'<text x="{left}" y="16" class="title">{html.escape(title)}</text>']
    for step in range(5):
        y = top + height - height * step / 4
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="left">{span * step / 4:.4g}</text>')
    for name, at in zip(x, place):
        parts.append(f'<text x="{at:.1f}" y="{top + height + 18}" class="below">{html.escape(name)}</text>')
    for index, (name, line) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        points = [(at, top + height - height * value / span) for at, value in zip(place, line)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{path}" stroke="{colour}"/>')
        for (a, b), value in zip(points, line):
            told = html.escape(f"{name}: {value:.4g} {unit}")
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"><title>{told}</title></circle>')
        parts.append(
            f'<text x="{left + 130 * index}" y="{top + height + 40}" fill="{colour}">{html.escape(name)}</text>'
        )
    return f'<svg viewBox="0 0 480 280" role="img" aria-label="{html.escape(title)}">{"".join(parts)}</svg>'


def score_section(scores: StackScores, described: str) -> str:
    """Table and threshold curve of a stack's scores."""
    rows = {
        "V_rand after thinning": f"{scores.best_v_rand:.4f} at {scores.best_v_rand_threshold:.1f}",
        "V_info after thinning": f"{scores.best_v_info:.4f} at {scores.best_v_info_threshold:.1f}",
        "Dice of the membrane": f"{scores.dice:.4f}",
        "pixel error": f"{scores.pixel_error:.4f}",
    }
    curve = chart(
        "scores over the threshold",
        [f"{threshold:.1f}" for threshold in scores.thresholds],
        {"V_rand": scores.v_rand, "V_info": scores.v_info},
        "",
    )
    return f"<h2>Scores</h2><p>{html.escape(described)}</p><div class='side'>{table(rows)}{curve}</div>"


def speed_section(benchmark: dict[str, Any]) -> str:
    """Throughput and latency of ``serve/benchmark.py``'s JSON, as charts."""
    rows = lone_rows(benchmark)
    if not rows:
        return "<h2>Speed</h2><p>Something else was running: no row of the benchmark is to be believed.</p>"
    side, sizes = rows[0]["tile_size"], [row["batch_size"] for row in rows]
    throughput: dict[str, list[float]] = {}
    for row in benchmark["rows"]:
        if row["tile_size"] == side and row["concurrency"] == 1 and row["batch_size"] in sizes and not row["refused"]:
            throughput.setdefault(row["level"], []).append(row["img_per_s"])
    whole = {level: rates for level, rates in throughput.items() if len(rates) == len(sizes)}
    latency = {name: [row[f"{name}_ms"] for row in rows] for name in ("p50", "p95", "p99")}
    names = [f"batch {size}" for size in sizes]
    return (
        f"<h2>Speed</h2><p>Images of {side} x {side}, one request at a time.</p><div class='side'>"
        f"{chart('images per second', names, whole, 'img/s')}"
        f"{chart('latency through Triton, ms', names, latency, 'ms')}</div>"
    )


def table(rows: dict[str, Any]) -> str:
    """Names and values as an HTML table."""
    lines = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(lines)}</table>"


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


def write_report(out: Path, title: str, slices: list[dict[str, Any]], sections: Sequence[str]) -> None:
    """Write the page, whole or not at all; it needs nothing but a browser."""
    # "</" must not occur in a script element.
    data = json.dumps(slices).replace("</", "<\\/")
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("@TITLE@", html.escape(title)).replace("@SECTIONS@", "\n".join(sections))
    with atomic_file(out) as aside:
        aside.write_text(page.replace("@SLICES@", data), encoding="utf-8")


def page_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        ReportError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(f"{path} does not exist: make it first, or leave its flag away") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON: make it again") from error
