"""The report page, moved in a real browser."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from serve.measure.page.report import chart, speed_section
from serve.report import main

RNG = np.random.default_rng(4)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three slices with everything on it."""
    folder = tmp_path_factory.mktemp("report")
    labels = np.full((3, 64, 80), 255, np.uint8)
    labels[:, 30:33] = 0
    images = np.clip(labels * 0.6 + np.arange(3)[:, None, None] * 40, 0, 255).astype(np.uint8)
    for name, pixels in (("images", images), ("labels", labels), ("found", (labels / 255).astype(np.float32))):
        tifffile.imwrite(folder / f"{name}.tif", pixels, photometric="minisblack")
    row = {"concurrency": 1, "refused": "", "tile_size": 572}
    row |= {"img_per_s": 30.0, "p50_ms": 30.0, "p95_ms": 40.0, "p99_ms": 41.0}
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
    text = page.read_text()
    assert not re.search(r"(?:src|href)=\"(?!data:)", text)
    assert "http" not in text
    assert "@" not in re.sub(r"data:[^\"]*", "", text)
    HTMLParser().feed(text)
    for said in ("V_rand", "Dice of the membrane</th><td>1.0000", "images per second", "p99: 41 ms", "abababababab"):
        assert said in text
    assert "python &lt;export&gt;" in text


# Moves the slider as a hand would, and leaves in the document what a user would then see.
_MOVE = """
<script>
window.addEventListener("load", () => {
  const seen = [], slider = document.getElementById("slice");
  for (const value of ["0", "2", "1"]) {
    slider.value = value;
    slider.dispatchEvent(new Event("input", {bubbles: true}));
    seen.push([document.getElementById("number").textContent, document.getElementById("input").src]);
  }
  document.body.insertAdjacentHTML("beforeend", "<pre id='seen'></pre>");
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
</body>
"""


def test_the_slider_moves_in_a_browser(page: Path, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium was found: install it (Debian: apt-get install chromium)")
    moved = tmp_path / "moved.html"
    moved.write_text(page.read_text().replace("</body>", _MOVE))
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--enable-logging=stderr",
        "--v=0",
    ]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1300"]
    done = subprocess.run(
        [browser, *options, "--dump-dom", moved.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<pre id=\"seen\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert found is not None
    seen = json.loads(found[1])
    assert [number for number, _ in seen] == ["0", "2", "1"]
    means = []
    for _, source in seen:
        raw = base64.b64decode(source.split(",", 1)[1])
        means.append(np.asarray(Image.open(io.BytesIO(raw))).mean())
    assert means[0] < means[2] < means[1]
    assert all(one != other for one, other in itertools.combinations([source for _, source in seen], 2))
    shot = tmp_path / "shot.png"
    subprocess.run(
        [browser, *options, f"--screenshot={shot}", page.as_uri()], capture_output=True, check=True, timeout=120
    )
    assert np.asarray(Image.open(shot).convert("L")).std() > 5


def test_a_probability_of_another_stack_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, pages in (("a", 2), ("b", 3)):
        tifffile.imwrite(tmp_path / f"{name}.tif", np.zeros((pages, 9, 9), np.uint8), photometric="minisblack")
    line = ["--images", str(tmp_path / "a.tif"), "--probability", str(tmp_path / "b.tif")]
    assert main(line) == 2
    assert "is not of" in capsys.readouterr().err


def test_a_benchmark_of_refused_rows_draws_nothing() -> None:
    row = {"level": "gRPC", "concurrency": 1, "tile_size": 572, "batch_size": 1, "refused": "another load"}
    assert "no row of the benchmark is to be believed" in speed_section({"rows": [row]})


def test_another_benchmark_is_one_sentence(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (page.parent / "other.json").write_text("{}")
    line = ["--images", page.parent / "images.tif", "--probability", page.parent / "found.tif"]
    assert main([*map(str, line), "--benchmark", str(page.parent / "other.json")]) == 2
    assert "other.json is not what serve/benchmark.py writes" in capsys.readouterr().err


def test_a_flat_line_can_be_drawn() -> None:
    assert "nan" not in chart("flat", ["a", "b"], {"one": [1.0, 1.0]}, "s")
