"""The page about a run: known merges and splits at their places, a real run, folds, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from tests.cards import rewrite_record, sealed
from tests.serve.measure.browser import browser
from train.input.store import Slice
from train.report.__main__ import main
from train.report.slices import BOTH, MERGED, PICTURED, SPLIT, draw, score_slices
from unet.scores.truth import merges_and_splits, true_segments

GREY = 100


def four_cells() -> npt.NDArray[np.uint8]:
    """A label of four cells side by side, each 30 pixels wide, the membrane between them 2 pixels wide."""
    label = np.ones((60, 126), np.uint8)
    for column in (30, 62, 94):
        label[:, column : column + 2] = 0
    return label


def faulty() -> npt.NDArray[np.float32]:
    """A probability that joins the first two cells by a gap, and cuts the fourth across."""
    found = four_cells().astype(np.float32)
    found[20:23, 30:32] = 0.9
    found[40:42, 96:] = 0.1
    return found


def slice_of(name: str, label: npt.NDArray[np.uint8]) -> Slice:
    return Slice(name, np.full(label.shape, GREY, np.uint8), label)


def test_a_merge_and_a_split_are_counted_and_drawn_where_they_are() -> None:
    truth, proposal = true_segments(four_cells()), faulty() > 0.5
    merged, split = merges_and_splits(proposal, truth)
    assert (merged, split) == ([1, 2], [4])
    drawn = draw(np.full(truth.shape, GREY, np.uint8), truth, proposal, merged, split)
    mixed = {name: tuple(round((GREY + part) / 2) for part in colour) for name, colour in COLOURS.items()}
    seen = {place: tuple(drawn[place]) for place in ((5, 5), (5, 45), (5, 75), (5, 110), (55, 110))}
    assert seen == {
        (5, 5): mixed["merged"],
        (5, 45): mixed["merged"],
        (5, 75): (GREY,) * 3,
        (5, 110): mixed["split"],
        (55, 110): mixed["split"],
    }
    # The line of the cut crosses the fourth cell, and none runs between the first two, which are one.
    lines = (drawn == 255).all(axis=-1)
    assert lines[38:44, 110].sum() == 1
    assert not lines[:, 26:36].any()
    assert lines[:, 58:68].any(axis=1).all()


COLOURS = {"merged": MERGED, "split": SPLIT, "both": BOTH}


def test_a_cell_that_is_merged_and_split_has_its_own_colour() -> None:
    truth, proposal = true_segments(four_cells()), faulty() > 0.5
    proposal[10:12, :30] = False
    drawn = draw(np.zeros(truth.shape, np.uint8), truth, proposal, *merges_and_splits(proposal, truth))
    assert tuple(drawn[5, 5]) == tuple(round(part / 2) for part in BOTH)


def test_the_worst_slices_come_first_and_have_pictures() -> None:
    label = four_cells()
    better = np.where(label == 1, 1, 0).astype(np.float32)
    answers = {f"good {number}": better for number in range(PICTURED)} | {"bad": faulty()}
    left = iter(answers.values())
    found = score_slices(lambda _: next(left), [slice_of(name, label) for name in answers], 0.5, "fold 1, ")
    assert [one.name for one in found] == ["fold 1, bad", *(f"fold 1, good {number}" for number in range(PICTURED))]
    assert [(one.marks.merged, one.marks.split) for one in found] == [(2, 1), *[(0, 0)] * PICTURED]
    assert [bool(one.marks.picture) for one in found] == [True] * PICTURED + [False]
    assert found[0].scores["v_rand"] < found[1].scores["v_rand"] == pytest.approx(1)
    shown = pixels_of(found[0].marks.picture)
    assert shown.shape == (*label.shape, 3)
    assert shown[5, 5, 0] - shown[5, 5, 2] > 50  # vermilion
    assert shown[5, 110, 2] - shown[5, 110, 0] > 50  # blue


def test_only_the_annotated_band_of_a_slice_is_drawn() -> None:
    label = four_cells()
    label[:30] = 255
    found = score_slices(lambda _: faulty(), [slice_of("band", label)], 0.5)
    # The gap of the first two cells lies above the band.
    assert (found[0].marks.merged, found[0].marks.split) == (0, 1)
    assert pixels_of(found[0].marks.picture).shape == (30, 126, 3)


def pixels_of(source: str) -> npt.NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))), np.int64)


def report_of(folder: Path, out: Path, *flags: str) -> str:
    assert main(["--model_dir", str(folder), "--out", str(out), *flags]) == 0
    return out.read_text()


def test_the_page_of_a_run(trained: Path, tmp_path: Path, contents: Callable[[Path], dict[str, bytes]]) -> None:
    before = contents(trained)
    text = report_of(trained, tmp_path / "report.html")
    assert contents(trained) == before
    outside = re.sub(r"data:[^\"]*", "", text)
    assert not re.search(r"(?:src|href)=\"[^\"]", outside)
    assert "http" not in outside
    assert not re.search(r"@[A-Z]+@", outside)
    HTMLParser().feed(text)
    record = json.loads((trained / "config.json").read_text())
    for said in ("did not see them", "base_filters 2", "train-volume.tif[4]", "1 held out", "96 x 96 pixels"):
        assert said in text
    assert f"best, of step {record['trained']['weights_step']}" in text
    # One slice is held out: its scores are those of `evaluate`.
    scores = json.loads((trained / "eval" / "scores-96x96.json").read_text())
    for name in ("v_rand_at_threshold", "v_info_at_threshold", "dice", "pixel_error"):
        assert text.count(f"{scores[name]:.4f}") >= 2


@pytest.mark.parametrize("width", [1280, 800])
def test_nothing_is_cut_off_at_this_width(trained: Path, tmp_path: Path, width: int) -> None:
    report_of(trained, tmp_path / "report.html")
    with browser(tmp_path) as tab:
        tab.open(tmp_path / "report.html", width, 1600)
        tab.run("await Promise.all([...document.images].map((one) => one.decode()))")
        assert tab.errors == []
        assert tab.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_a_run_without_held_out_slices_says_so(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    rewrite_record(folder, held_out={})
    text = report_of(folder, tmp_path / "report.html")
    assert "The run held no slices out. These are its validation slices" in text
    assert "train-volume.tif[2]" in text
    rewrite_record(folder, validation={})
    text = report_of(folder, tmp_path / "report.html")
    assert "train with --crossvalidation_idx" in text
    assert "Cells that are merged" not in text


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    record = json.loads((folder / "config.json").read_text())
    del record["trained"]
    (folder / "config.json").write_text(sealed(record))
    for name in ("best", "checkpoints"):
        shutil.rmtree(folder / name)
    lines = (folder / "log.json").read_text().splitlines(keepends=True)
    # The trainer is in the middle of a line.
    (folder / "log.json").write_text("".join(lines[:3]) + lines[3][:20])
    text = report_of(folder, tmp_path / "report.html")
    assert "of 6 steps, not finished" in text
    assert "no weights yet" in text
    (folder / "log.json").unlink()
    assert "The log has no loss yet" in report_of(folder, tmp_path / "report.html")


def test_the_page_of_folds(trained: Path, tmp_path: Path) -> None:
    for number in (0, 4):
        shutil.copytree(trained, tmp_path / "folds" / f"fold-{number}")
    unscored = shutil.copytree(trained, tmp_path / "folds" / "fold-2")
    shutil.rmtree(unscored / "eval")
    text = report_of(tmp_path / "folds", tmp_path / "report.html")
    assert "Not scored yet: fold 2." in text
    scores = json.loads((trained / "eval" / "scores-96x96.json").read_text())
    row = f"<td>{scores['v_rand_at_threshold']:.4f}</td><td>{scores['v_info_at_threshold']:.4f}</td>"
    for name in ("0", "4", "mean"):
        assert f"<tr><td>{name}</td>{row}" in text
    assert "<td>standard deviation</td><td>0.0000</td>" in text
    for number in (0, 2, 4):
        assert f"fold {number}, train-volume.tif[4]" in text


def test_what_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(folder: Path, *flags: Any) -> str:
        assert main(["--model_dir", str(folder), "--out", str(tmp_path / "report.html"), *map(str, flags)]) == 2
        assert not (tmp_path / "report.html").exists()
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    assert "holds no training run" in refused(tmp_path)
    assert "no training stack in" in refused(trained, "--data_dir", tmp_path)
    pages = 1 - np.eye(96, dtype=np.uint8)[np.newaxis].repeat(3, axis=0)
    for name in ("volume", "labels"):
        tifffile.imwrite(tmp_path / f"train-{name}.tif", pages, photometric="minisblack")
    assert "is of a stack of 3 pages, but the run held out 4" in refused(trained, "--data_dir", tmp_path)
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "log.json").write_text("DLLL no\n")
    assert "log.json is damaged in line 1" in refused(folder)
