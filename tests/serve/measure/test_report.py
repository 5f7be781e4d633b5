"""The report page, moved in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from serve.measure.common import MeasureError
from serve.measure.page.charts import COLOURS, MARKERS, line_figure, speed_charts
from serve.measure.page.report import ReportSettings, speed_section
from serve.report import main
from tests.serve.measure.browser import browser

RNG = np.random.default_rng(4)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three slices with everything on it."""
    folder = tmp_path_factory.mktemp("report")
    labels = np.full((3, 64, 80), 255, np.uint8)
    labels[:, 30:33] = 0
    images = np.clip(labels * 0.6 + np.arange(3)[:, None, None] * 40, 0, 255).astype(np.uint8)
    found = (labels / 255).astype(np.float32)
    found[0, 30:33, 20:22] = 0.6  # joins the cells above and below where the threshold is lower
    for name, pixels in (("images", images), ("labels", labels), ("found", found)):
        tifffile.imwrite(folder / f"{name}.tif", pixels, photometric="minisblack")
    row = {"concurrency": 1, "refused": "", "tile_size": 572}
    row |= {"img_per_s": 30.0, "p50_ms": 30.0, "p95_ms": 40.0, "p99_ms": None}
    levels = ("engine", "shared memory")
    benchmark = {"rows": [{"level": one, "batch_size": size, **row} for one in levels for size in (1, 8, 16)]}
    (folder / "benchmark.json").write_text(json.dumps(benchmark))
    entry = {"file": "model.onnx", "sha256": "ab" * 32, "created": "now", "command": "python <export>"}
    card = {"model": {"base_filters": 16}, "tile_sizes": [572], "engine": None, "artefacts": {"onnx": entry}}
    (folder / "card.json").write_text(json.dumps(card))
    line = ["--images", folder / "images.tif", "--probability", folder / "found.tif", "--labels", folder / "labels.tif"]
    line += ["--benchmark", folder / "benchmark.json", "--artefacts", folder, "--out", folder / "report.html"]
    assert main([str(word) for word in line]) == 0
    return folder / "report.html"


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = re.sub(r"data:[^\"]*", "", page.read_text())
    assert not re.search(r"(?:src|href)=\"[^\"]", text)
    assert "http" not in text
    assert not re.search(r"@[A-Z]+@", text)
    HTMLParser().feed(text)
    for said in ("V_rand", "Dice of the membrane</th><td>0.99", "one request at a time", "abababababab"):
        assert said in text
    assert "python &lt;export&gt;" in text


# Moves slider and threshold as a hand would, and returns what a user would then see.
_MOVE = """
const seen = [], slider = document.getElementById("slice"), canvas = document.getElementById("overlay");
const drawn = () => new Promise((done) => document.addEventListener("drawn", done, { once: true }));
const text = (id) => document.getElementById(id).textContent;
const at = (name, x, y) => {
  const context = document.getElementById(name).getContext("2d");
  return [...context.getImageData(x, y, 1, 1).data].slice(0, 3);
};
const note = () => seen.push({
  number: text("number"), cut: text("cut"), input: document.getElementById("input").src,
  chart: document.getElementById("scores").src, cursor: document.getElementById("cursor").style.left,
  membrane: at("overlay", 40, 31), above: at("truth", 40, 10), below: at("truth", 40, 50), line: at("truth", 40, 31),
  counts: ["merged", "split", "both"].map(text),
});
for (const value of ["1", "2", "0"]) {
  slider.value = value;
  const done = drawn();
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  await done;
  note();
}
const box = canvas.getBoundingClientRect();
canvas.setPointerCapture = () => {};
for (const share of [0.1, 0.9]) {
  const done = drawn();
  const place = { clientX: box.left + share * box.width, clientY: box.top + 5, pointerId: 1, buttons: 1 };
  canvas.dispatchEvent(new PointerEvent("pointerdown", place));
  await done;
  note();
}
return seen;
"""


def test_slices_and_threshold_move_in_a_browser(page: Path, tmp_path: Path) -> None:
    with browser(tmp_path) as tab:
        tab.open(page)
        seen = tab.run(_MOVE)
        assert tab.errors == []
    slices, (low, high) = seen[:3], seen[3:]
    assert [one["number"] for one in slices] == ["1", "2", "0"]
    means = [np.asarray(Image.open(io.BytesIO(raw(one["input"])))).mean() for one in slices]
    assert means[2] < means[0] < means[1]
    # Each slice has its own chart; the membrane, probability 0, is drawn over the input at any threshold.
    assert len({one["chart"] for one in slices}) == 3
    assert all(one["membrane"][0] > one["membrane"][2] + 50 for one in seen)
    assert [one["cut"] for one in (*slices, low, high)] == ["0.50", "0.50", "0.50", "0.10", "0.90"]
    # The line in the chart goes with it.
    assert [percent(one["cursor"]) for one in (low, high)] == pytest.approx([11 + 8.6, 11 + 77.4], abs=0.1)
    # Slice 0's upper cell has a bridge of probability 0.6 to the lower one: merged until the threshold is above it.
    assert low["counts"] == ["2", "0", "0"]
    assert low["above"] == low["below"] == [213, 94, 0]
    assert high["counts"] == ["0", "0", "0"]
    assert high["above"] == [207, 216, 207]
    assert low["line"] == [0, 0, 0]


def raw(source: str) -> bytes:
    """What a data address holds."""
    return base64.b64decode(source.split(",", 1)[1])


def percent(left: str) -> float:
    """The share in a style such as calc(12.5% - 1px)."""
    found = re.search(r"([\d.]+)%", left)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off_at_this_width(page: Path, tmp_path: Path, width: int) -> None:
    with browser(tmp_path) as tab:
        tab.open(page, width, 1600)
        tab.run("await Promise.all([...document.images].map((one) => one.decode()))")
        assert tab.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        picture = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("L"))
    assert picture.shape == (1600, width)
    assert picture.std() > 5
    # White to the left and right: nothing runs out of the page.
    assert picture[:, [0, 1, -2, -1]].min() == 255


def test_lines_of_a_chart_differ_and_their_legend_fits() -> None:
    names = ["engine", "gRPC", "shared memory", "perf_analyzer", "CUDA shared memory"]
    figure = line_figure(["1", "8"], {name: [1.0, None] for name in names}, "batch", "images per second")
    drawn = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert len({colour for colour, _ in drawn}) == len({marker for _, marker in drawn}) == len(names)
    assert len(set(COLOURS)) == len(COLOURS) == len(MARKERS)
    FigureCanvasAgg(figure).draw()  # type: ignore[no-untyped-call]
    legend, whole, axes = figure.legends[0].get_window_extent(), figure.bbox, figure.axes[0].get_window_extent()
    assert whole.x0 <= legend.x0 < legend.x1 <= whole.x1
    assert axes.y1 < legend.y0 < legend.y1 <= whole.y1
    label = figure.axes[0].yaxis.label.get_window_extent()
    assert axes.y0 <= label.y0 < label.y1 <= axes.y1
    assert whole.x0 <= label.x0
    ticks = np.diff(figure.axes[0].get_yticks())
    assert ticks == pytest.approx(ticks[0])


def test_without_a_stack_it_shows_what_the_demo_made(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 2
    assert "or run `make demo` first" in capsys.readouterr().err
    names = {"images": "held-out-volume", "found": "held-out-volume-probability", "labels": "held-out-labels"}
    (tmp_path / "demo" / "artefacts").mkdir(parents=True)
    for name, of_demo in names.items():
        shutil.copy(page.parent / f"{name}.tif", tmp_path / "demo" / f"{of_demo}.tif")
    shutil.copy(page.parent / "card.json", tmp_path / "demo" / "artefacts" / "card.json")
    assert main([]) == 0
    text = (tmp_path / "report.html").read_text()
    for said in ("held-out-volume.tif", "Dice of the membrane", "<h2>Card</h2>"):
        assert said in text
    assert "<h2>Speed</h2>" not in text
    with pytest.raises(MeasureError, match="go together"):
        ReportSettings(images=Path("a.tif")).or_demo()


def test_a_probability_of_another_stack_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, pages in (("a", 2), ("b", 3)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((pages, 9, 9), np.uint8), photometric="minisblack")
    line = ["--images", str(tmp_path / "a.tif"), "--probability", str(tmp_path / "b.tif")]
    assert main(line) == 2
    assert "is not of" in capsys.readouterr().err


def test_a_benchmark_of_refused_rows_draws_nothing(tmp_path: Path) -> None:
    row = {"level": "gRPC", "concurrency": 1, "tile_size": 572, "batch_size": 1, "refused": "another load"}
    (tmp_path / "benchmark.json").write_text(json.dumps({"rows": [row]}))
    assert "no row of the benchmark can be relied on" in speed_section(tmp_path / "benchmark.json")


def test_another_benchmark_is_one_sentence(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (page.parent / "other.json").write_text("{}")
    line = ["--images", page.parent / "images.tif", "--probability", page.parent / "found.tif"]
    assert main([*map(str, line), "--benchmark", str(page.parent / "other.json")]) == 2
    assert "other.json is not what serve/benchmark.py writes" in capsys.readouterr().err


def test_a_benchmark_without_enough_requests_for_a_percentile_is_drawn() -> None:
    row = {"level": "gRPC", "concurrency": 1, "tile_size": 572, "refused": "", "img_per_s": 9.0, "p50_ms": 3.0}
    rows = [{**row, "batch_size": size, "p99_ms": None} for size in (1, 8)]
    side, charts = speed_charts({"rows": rows})
    assert (side, len(charts)) == (572, 2)
