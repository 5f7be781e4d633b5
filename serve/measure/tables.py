"""The results of the benchmark as Markdown, as CSV with perf_analyzer's columns, and as charts."""

from __future__ import annotations

import csv
import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from serve.measure.common import LEAST_REQUESTS
from serve.measure.levels import WAYS, EngineLevel
from serve.measure.perf_analyzer import COLUMNS
from serve.measure.rows import SLICE_PX, Row
from unet.files import atomic_file
from unet.measure import markdown, ratios

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

NOT_MEASURED = "not measured"
# The reference document's inference figures, img/s on one V100 16 GB at 572 x 572: (TF-AMP, FP32) by batch size.
V100_IMG_PER_S: dict[int, tuple[str, str]] = {
    1: ("62.81", "34.27"),
    8: ("79.62", "37.09"),
    16: ("83.33", "out of memory"),
}
V100_TILE = 572

# Of a chart: its height, and how far its line goes down and up from there.
Bar = tuple[float, float, float]
_NO_BAR: Bar = (np.nan, 0.0, 0.0)


def figure(value: float | None, digits: int = 1) -> str:
    """A number for a table; a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def levels_of(rows: Sequence[Row]) -> list[str]:
    """The levels in the order in which they were measured first."""
    return list(dict.fromkeys(row.level for row in rows))


def loads_of(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Tile size, batch size and concurrency of the rows, each once."""
    return list(dict.fromkeys((row.tile_size, row.batch_size, row.concurrency) for row in rows))


def by_level(rows: Sequence[Row], load: tuple[int, int, int]) -> dict[str, Row]:
    """The rows under one load."""
    return {row.level: row for row in rows if (row.tile_size, row.batch_size, row.concurrency) == load}


def _rate(row: Row | None) -> str:
    if row is None:
        return NOT_MEASURED
    return "refused" if row.refused else figure(row.img_per_s, 2)


def throughput_table(rows: Sequence[Row]) -> str:
    """Images a second at every level, beside what the reference document measured on its V100."""
    levels = levels_of(rows)
    lines = []
    for load in loads_of(rows):
        found = by_level(rows, load)
        cells = [_rate(found.get(level)) for level in levels]
        through = [found[one].slices_per_s for one in levels if one in found and not found[one].refused]
        v100 = V100_IMG_PER_S.get(load[1]) if load[0] == V100_TILE else None
        lines.append([*map(str, load), *cells, figure(max(through, default=None), 2), *(v100 or (NOT_MEASURED,) * 2)])
    head = ["tile", "batch", "requests at a time", *(f"{one}, img/s" for one in levels)]
    return markdown([*head, "best, 512 x 512 slices/s", "V100 FP16 img/s", "V100 FP32 img/s"], lines)


def latency_table(rows: Sequence[Row]) -> str:
    """Where the time of a request goes, and what it takes."""
    lines = []
    for row in rows:
        what = [row.level, str(row.tile_size), str(row.batch_size), str(row.concurrency)]
        if row.refused:
            lines.append([*what, *["refused"] * 9, *["-"] * 5])
            continue
        cells = [figure(row.requests, 0)]
        cells += [figure(time) for time in (row.p50_ms, row.p90_ms, row.p95_ms, row.p99_ms)]
        cells += [figure(time) for time in (row.queue_ms, row.compute_input_ms)]
        cells += [figure(time) for time in (row.compute_infer_ms, row.compute_output_ms)]
        wire = None if row.wire_bytes_per_img is None else row.wire_bytes_per_img / 1e3
        cells += [figure(row.images_per_pass, 2), figure(row.client_cores, 2), figure(row.server_cores, 2)]
        lines.append([*what, *cells, figure(row.server_rss_mib, 0), figure(wire)])
    head = ["level", "tile", "batch", "requests at a time", "requests", "p50 ms", "p90 ms", "p95 ms", "p99 ms"]
    head += ["queue ms", "input ms", "infer ms", "output ms", "images in a pass"]
    return markdown([*head, "client cores", "server cores", "server MiB", "kB on the wire/img"], lines)


def ratio_table(rows: Sequence[Row], base: str) -> str:
    """Every level's rate over one level's, round by round: the median, and in brackets the least and the most."""
    others = [level for level in levels_of(rows) if level != base]
    lines = []
    for load in loads_of(rows):
        found = by_level(rows, load)
        cells = []
        for one in others:
            if one not in found or base not in found or found[one].refused or found[base].refused:
                cells.append("-")
                continue
            each = ratios(found[one].rounds, found[base].rounds)
            cells.append(f"{statistics.median(each):.3f} ({each[0]:.3f}-{each[-1]:.3f})")
        lines.append([*map(str, load), *cells])
    return markdown(["tile", "batch", "requests at a time", *(f"{one} / {base}" for one in others)], lines)


def v100_table(rows: Sequence[Row], gpu: str) -> str:
    """The reference's V100 beside ours, where this ran on one."""
    lines = []
    for size, (half, single) in V100_IMG_PER_S.items():
        cells = []
        for level in (EngineLevel.name, *WAYS.values()):
            row = by_level(rows, (V100_TILE, size, 1)).get(level)
            measured = row is not None and not row.refused and "V100" in gpu
            cells.append(figure(row.img_per_s, 2) if row is not None and measured else NOT_MEASURED)
        lines.append([str(size), half, single, *cells])
    head = ["batch", "reference TF-AMP, img/s", "reference FP32, img/s"]
    return markdown([*head, "our plan alone", *(f"through Triton, {way}" for way in WAYS.values())], lines)


def report(
    rows: Sequence[Row], stack: Mapping[str, Any], not_measured: Mapping[str, str], heading: str, gpu: str
) -> str:
    """Everything that a benchmark found, as Markdown.

    Args:
        rows: of every level under every load.
        stack: what `Bench.stack` holds.
        not_measured: reasons by name.
        heading: where and how it was measured.
        gpu: the name of this machine's GPU, empty if there is none.
    """
    parts = [
        heading,
        "The V100 columns are another machine's: the reference document measured TensorFlow there, with no server.",
        throughput_table(rows),
    ]
    if stack:
        each = stack["client_over_engine"]
        parts.append(
            f"A stack of {stack['slices']} slices of {SLICE_PX} x {SLICE_PX} from file to file by the client: "
            f"{stack['client_slices_per_s']:.2f} slices/s, by the engine on arrays in memory "
            f"{stack['engine_slices_per_s']:.2f}; ratio {statistics.median(each):.3f} "
            f"({each[0]:.3f}-{each[-1]:.3f}), {stack['tiles_per_slice']} tile of {stack['tile_size']} for a slice."
        )
    if EngineLevel.name in levels_of(rows):
        parts += ["Over the engine alone, round by round:", ratio_table(rows, EngineLevel.name)]
    fewest = ", ".join(f"p{share} from {least:,}" for share, least in LEAST_REQUESTS.items() if least > 1)
    parts += [f"Where the time goes (a percentile needs enough requests: {fewest}):", latency_table(rows)]
    if any(load[0] == V100_TILE for load in loads_of(rows)):
        parts += ["On a V100:", v100_table(rows, gpu)]
    parts += refusals(rows)
    parts += [f"{NOT_MEASURED}: {name}: {reason}" for name, reason in not_measured.items()]
    return "\n\n".join(parts)


def refusals(rows: Sequence[Row]) -> list[str]:
    """A line for each row that cannot be relied on."""
    return [
        f"refused: {row.level}, tile {row.tile_size}, batch {row.batch_size}, {row.concurrency} at a time: "
        f"{row.refused}"
        for row in rows
        if row.refused
    ]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows by perf_analyzer's names for its columns, times in microseconds, after three of our own."""
    with atomic_file(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["Level", "Tile", "Batch", *COLUMNS, "Refused"])
        writer.writeheader()
        for row in rows:
            ours = {"Level": row.level, "Tile": row.tile_size, "Batch": row.batch_size, "Refused": row.refused}
            writer.writerow({**ours, **row.columns()})


def draw(folder: Path, rows: Sequence[Row]) -> None:
    """Draw ``throughput.png`` and ``latency.png``; a refused row is left out, and where all are nothing is drawn."""
    if all(row.refused for row in rows):
        return
    loads, levels = loads_of(rows), levels_of(rows)
    names = [f"{tile}, batch {batch}" + (f", {many} at a time" if many > 1 else "") for tile, batch, many in loads]
    found = [by_level([row for row in rows if not row.refused], load) for load in loads]
    throughput = {level: [_spread(one.get(level)) for one in found] for level in levels}
    latency = {level: [_tail(one.get(level)) for one in found] for level in levels}
    _chart(folder / "throughput.png", names, throughput, "img/s; the line is the spread of the rounds")
    _chart(
        folder / "latency.png",
        names,
        latency,
        "p50 of a request, ms; the line goes up to the highest percentile known",
        log=True,
    )


def _spread(row: Row | None) -> Bar:
    if row is None:
        return _NO_BAR
    return row.img_per_s, max(0.0, row.img_per_s - min(row.rounds)), max(0.0, max(row.rounds) - row.img_per_s)


def _tail(row: Row | None) -> Bar:
    if row is None or row.p50_ms is None:
        return _NO_BAR
    tail_ms = row.p50_ms if row.p99_ms is None else row.p99_ms
    return row.p50_ms, 0.0, max(0.0, tail_ms - row.p50_ms)


def _chart(
    path: Path,
    names: Sequence[str],
    series: Mapping[str, Sequence[Bar]],
    label: str,
    *,
    log: bool = False,
) -> None:
    """Groups of bars, or of points on a logarithmic axis, each with how far its line goes down and up."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(max(7.0, 1.6 * len(names)), 4), layout="constrained")
    axes: Any = picture.subplots()
    places, width = np.arange(len(names)), 0.8 / len(series)
    for index, (name, values) in enumerate(series.items()):
        heights, below, above = (np.array([value[part] for value in values]) for part in range(3))
        at = places + (index - (len(series) - 1) / 2) * width
        reach = np.stack([below, above])
        if log:
            axes.errorbar(at, heights, yerr=reach, fmt="o", label=name)
        else:
            axes.bar(at, heights, width, yerr=reach, label=name, error_kw={"elinewidth": 0.8})
    axes.set_xticks(places, names)
    axes.set_ylabel(label)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(axis="y", alpha=0.3)
    picture.legend(loc="outside upper center", ncols=len(series))
    with atomic_file(path) as aside:
        picture.savefig(aside, dpi=110, format="png")
