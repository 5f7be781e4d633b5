"""Charts of the report by matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.measure.rows import lone_rows
from unet.page import svg

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from unet.scores import StackScores

# Okabe and Ito's colours, which people with any colour vision tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"
# The axes of the score chart: left, bottom, width and height as shares of the picture. The page draws its line there.
SCORE_AXES = (0.11, 0.14, 0.86, 0.66)
_INCHES = (5.6, 3.6)


def line_figure(
    names: Sequence[str], series: Mapping[str, Sequence[float | None]], x_label: str, y_label: str
) -> Figure:
    """Lines over named places, from 0 on; the legend stands above them.

    Args:
        names: of the places.
        series: values by the line's name, one for each place; None leaves a gap.
        x_label: what the places are.
        y_label: what the values are, with their unit.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_INCHES, layout="constrained")
    axes: Any = figure.subplots()
    for index, (name, values) in enumerate(series.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        heights = [float("nan") if value is None else value for value in values]
        axes.plot(range(len(names)), heights, label=name, linewidth=1.8, markersize=6, **style)
    axes.set_xticks(range(len(names)), names)
    axes.margins(x=0.08)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.set_ylim(
        0, 1.1 * max([value for values in series.values() for value in values if value is not None], default=1)
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    return figure


def score_chart(title: str, one: StackScores, mean: StackScores) -> str:
    """The scores of a slice over the threshold, and beside them the mean of all slices.

    Args:
        title: which slice.
        one: its scores.
        mean: those of all.

    Returns:
        The chart as a data address, its axes at `SCORE_AXES` and from 0 to 1 both ways.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=_INCHES)
    axes: Any = figure.add_axes(SCORE_AXES)
    for index, name in enumerate(("v_rand", "v_info")):
        label, colour = name.replace("v_", "V_"), COLOURS[index]
        slice_style = {"marker": MARKERS[index], "label": f"{label}, {title}"}
        mean_style = {"linestyle": ":", "label": f"{label}, mean of all"}
        # The markers at 0 and 1 are drawn whole.
        axes.plot(one.thresholds, getattr(one, name), color=colour, clip_on=False, **slice_style)
        axes.plot(mean.thresholds, getattr(mean, name), color=colour, **mean_style)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="threshold of the probability", ylabel="score, 1 is best")
    axes.set_xticks([tick / 5 for tick in range(6)])
    axes.set_yticks([tick / 5 for tick in range(6)])
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="upper left", ncols=2, frameon=False, bbox_to_anchor=(0.03, 1.0))
    return svg(figure)


def speed_charts(benchmark: Mapping[str, Any]) -> tuple[int, list[str]]:
    """Throughput and latency of ``serve/benchmark.py``'s JSON.

    Returns:
        The side of an image, and two charts; no chart where no row of the benchmark can be relied on.
    """
    rows = lone_rows(benchmark)
    if not rows:
        return 0, []
    side, sizes = int(rows[0]["tile_size"]), [row["batch_size"] for row in rows]
    found: dict[str, dict[int, float]] = {}
    for row in benchmark["rows"]:
        if row["tile_size"] == side and row["concurrency"] == 1 and not row["refused"]:
            found.setdefault(row["level"], {})[row["batch_size"]] = row["img_per_s"]
    through = {level: [rates.get(size) for size in sizes] for level, rates in found.items()}
    shares = {name: [row.get(f"{name}_ms") for row in rows] for name in ("p50", "p90", "p95", "p99")}
    known = {name: values for name, values in shares.items() if any(value is not None for value in values)}
    names = [str(size) for size in sizes]
    return side, [
        svg(line_figure(names, through, "images in a request", "images per second")),
        svg(line_figure(names, known, f"images in a request by {rows[0]['level']}", "latency, ms")),
    ]
