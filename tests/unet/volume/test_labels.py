from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from unet.errors import UnetError
from unet.scores import dice, pixel_error, score_stack
from unet.scores.__main__ import main
from unet.volume import NOT_ANNOTATED, LabelOptions, StackError, add_label_flags, label_options, read_labels
from unet.volume.labels import _NAMED_VALUES, label_blocks, labels_of_ids

Array = npt.NDArray[Any]

# Two cells and the membrane between them, 0; a fifth of the pixels.
TRUTH = np.ones((2, 10, 20), np.uint8)
TRUTH[:, :, 8:12] = 0
# The same cells by number, as in CREMI and SNEMI3D.
IDS = np.zeros((2, 6, 8), np.uint64)
IDS[:, :, :4], IDS[:, :, 4:] = 7, 2**40


def write(folder: Path, labels: Array) -> Path:
    path = folder / "labels.tif"
    tifffile.imwrite(path, labels, photometric="minisblack")
    return path


def test_labels_the_wrong_way_round_are_refused_and_turned_by_the_flag(tmp_path: Path) -> None:
    path = write(tmp_path, (1 - TRUTH) * 255)
    with pytest.raises(StackError, match=r"80% membrane \(value 0\).*add --membrane_value"):
        read_labels(path)
    assert np.array_equal(read_labels(path, LabelOptions(membrane_value=255)), TRUTH)
    # Whoever insists gets them as they are.
    assert np.array_equal(read_labels(path, LabelOptions(membrane_value=0)), 1 - TRUTH)


@pytest.mark.parametrize("value", [0, 1, 255])
def test_labels_of_one_value_are_refused(tmp_path: Path, value: int) -> None:
    path = write(tmp_path, np.full((2, 4, 4), value, np.uint8))
    with pytest.raises(StackError, match=r"(0|100)% membrane"):
        read_labels(path)
    assert (read_labels(path, LabelOptions(membrane_value=0)) == (value != 0)).all()


def test_a_membrane_value_that_is_not_among_two_others_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StackError, match=r"values 0, 1 beside 255 by page 0"):
        read_labels(write(tmp_path, TRUTH), LabelOptions(membrane_value=255))


def test_scores_refuse_what_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "p.tif", TRUTH.astype(np.float32), photometric="minisblack")
    path = write(tmp_path, (1 - TRUTH) * 255)
    assert main([str(tmp_path / "p.tif"), str(path)]) == 2
    assert "80% membrane" in capsys.readouterr().err
    assert main([str(tmp_path / "p.tif"), str(path), "--membrane_value", "255"]) == 0
    assert "Dice of the membrane 1.0000" in capsys.readouterr().out


def test_what_nobody_annotated_is_marked_and_left_out_of_the_shares(tmp_path: Path) -> None:
    sparse = TRUTH.copy()
    sparse[:, :5] = 255
    with pytest.raises(StackError, match=r"values 1, 255 beside 0 by page 0.*--ignore_label"):
        read_labels(write(tmp_path, sparse))
    labels = read_labels(write(tmp_path, sparse), LabelOptions(ignore_label=255))
    assert np.array_equal(labels[:, 5:], TRUTH[:, 5:])
    assert (labels[:, :5] == NOT_ANNOTATED).all()
    with pytest.raises(StackError, match="no annotated pixel"):
        read_labels(write(tmp_path, np.full((1, 3, 3), 9, np.uint8)), LabelOptions(ignore_label=9))


def test_scores_leave_out_what_nobody_annotated() -> None:
    proposal = TRUTH.astype(np.float32)
    proposal[:, :5] = 1 - proposal[:, :5]  # wrong where nobody looks
    sparse = TRUTH.copy()
    sparse[:, :5] = NOT_ANNOTATED
    assert dice(proposal, TRUTH) < 1
    assert dice(proposal, sparse) == 1
    assert pixel_error(proposal, sparse) == 0
    scores = score_stack(proposal, sparse)
    assert (scores.dice, scores.best_v_rand, scores.best_v_info) == (1, 1, 1)
    with pytest.raises(UnetError, match="without any non-membrane pixel"):
        score_stack(proposal, np.full_like(TRUTH, NOT_ANNOTATED))


def test_what_nobody_annotated_joins_no_segments() -> None:
    label = np.ones((1, 12, 30), np.uint8)
    label[:, :, 12:18] = NOT_ANNOTATED
    scores = score_stack(np.ones(label.shape, np.float32), label)
    assert (scores.best_v_rand, scores.best_v_info) == (1, 1)


@pytest.mark.parametrize(("width", "columns"), [(1, [3]), (2, [3, 4]), (3, [2, 3, 4]), (4, [2, 3, 4, 5])])
def test_membrane_lies_between_ids(tmp_path: Path, width: int, columns: list[int]) -> None:
    expected = np.ones(IDS.shape, np.uint8)
    expected[:, :, columns] = 0
    options = LabelOptions(membrane_width=width, membrane_value=0)
    assert np.array_equal(read_labels(write(tmp_path, IDS), options), expected)


def labels_by_pixel(ids: Array, options: LabelOptions) -> Array:
    """What ``labels_of_ids`` says in whole arrays, pixel by pixel."""
    height, width = ids.shape
    sides = []
    for row, column in np.ndindex(height, width):
        for beyond in ((row, column + 1), (row + 1, column)):
            if beyond[0] < height and beyond[1] < width:
                one, other = ids[row, column], ids[beyond]
                if one != other and options.ignore_label not in (one, other):
                    sides += [(row, column), beyond] if options.membrane_width % 2 == 0 else [(row, column)]
    labels = np.ones(ids.shape, np.uint8)
    for row, column in np.ndindex(height, width):
        near = any(abs(row - r) + abs(column - c) <= (options.membrane_width - 1) // 2 for r, c in sides)
        if near or ids[row, column] == options.membrane_value:
            labels[row, column] = 0
        if ids[row, column] == options.ignore_label:
            labels[row, column] = NOT_ANNOTATED
    return labels


@settings(max_examples=200, deadline=None)
@given(
    ids=arrays(np.uint16, st.tuples(st.integers(1, 6), st.integers(1, 7)), elements=st.sampled_from([0, 1, 2, 9])),
    width=st.integers(1, 6),
    membrane=st.sampled_from([None, 0]),
    ignored=st.sampled_from([None, 9]),
)
def test_membrane_between_ids_is_that_of_each_pair_of_pixels(
    ids: Array, width: int, membrane: int | None, ignored: int | None
) -> None:
    options = LabelOptions(membrane, ignored, width)
    found = labels_of_ids(ids, options)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, labels_by_pixel(ids, options))


@pytest.mark.parametrize("values", [3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
def test_of_many_values_a_few_are_named(tmp_path: Path, values: int) -> None:
    path = write(tmp_path, np.arange(values, dtype=np.uint8).reshape(1, 1, values).repeat(3, 1))
    with pytest.raises(StackError) as caught:
        read_labels(path)
    named, more = min(values - 1, _NAMED_VALUES), " ..." if values - 1 > _NAMED_VALUES else ""
    assert f"has the values {', '.join(map(str, range(1, named + 1)))}{more} beside 0 by page 0" in str(caught.value)


def test_the_id_of_no_cell_is_membrane_and_that_of_no_annotation_has_no_border(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[:, 0], ids[:, -1] = 0, 2**64 - 1
    labels = read_labels(write(tmp_path, ids), LabelOptions(0, 2**64 - 1, 2))
    assert (labels[:, :2] == 0).all()  # the background, and the cells' first row beside it
    assert (labels[:, -1] == NOT_ANNOTATED).all()
    assert (labels[:, 2:-1] == [1, 1, 1, 0, 0, 1, 1, 1]).all()


def test_ids_are_not_guessed_and_a_grey_image_is_none(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="ids of cells, add --membrane_width"):
        read_labels(write(tmp_path, IDS + np.arange(2, dtype=np.uint64)[:, None, None]))
    grey = np.random.default_rng(0).integers(0, 256, (2, 30, 30)).astype(np.uint8)
    with pytest.raises(StackError, match="membrane between its ids"):
        read_labels(write(tmp_path, grey), LabelOptions(membrane_width=2))


@pytest.mark.parametrize("kind", ["tiff", "png", "palette"])
def test_rgb_masks_are_refused_with_what_to_do(tmp_path: Path, kind: str) -> None:
    colours = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)[TRUTH]
    path = tmp_path / "labels.tif"
    if kind == "tiff":
        tifffile.imwrite(path, colours, photometric="rgb")
    elif kind == "palette":
        tifffile.imwrite(path, TRUTH, photometric="palette", colormap=np.zeros((3, 256), np.uint16))
    else:
        path = tmp_path
        Image.fromarray(colours[0]).save(tmp_path / "labels.png")
    with pytest.raises(
        StackError,
        match=r"labels.* is a colour image, and RGB masks .* are not read: save the labels in grey, as a mask",
    ):
        read_labels(path)


def test_the_settings_of_a_run_say_how_its_labels_are_read() -> None:
    assert LabelOptions.of({}) == LabelOptions() == LabelOptions(None, None, 0)
    assert LabelOptions.of({"membrane_value": -1, "ignore_label": -1, "membrane_width": 0}) == LabelOptions()
    assert LabelOptions.of({"membrane_value": 0, "ignore_label": 0}) == LabelOptions(0, 0, 0)
    assert LabelOptions.of({"membrane_value": 3, "ignore_label": 4, "membrane_width": 5}) == LabelOptions(3, 4, 5)


def test_the_flags_say_how_labels_are_read() -> None:
    parser = argparse.ArgumentParser()
    add_label_flags(parser)
    assert label_options(parser.parse_args([])) == LabelOptions()
    flags = ["--membrane_value", "3", "--ignore_label", "4", "--membrane_width", "5"]
    assert label_options(parser.parse_args(flags)) == LabelOptions(3, 4, 5)


@pytest.mark.parametrize("options", [LabelOptions(), LabelOptions(membrane_width=1), LabelOptions(membrane_width=3)])
def test_a_page_by_blocks_is_the_page_at_once(tmp_path: Path, options: LabelOptions) -> None:
    """Where membrane lies between ids, a block looks beyond its rows; a page's share is that of all its blocks."""
    page = np.full((12, 20), 255, np.uint8)
    page[4:7, 8:], page[9:], page[:, 15:18] = 0, 0, 0
    if options.membrane_width:
        page = np.add.outer(np.arange(12) // 6 * 3, np.arange(20) // 10).astype(np.uint8)
    path = write(tmp_path, np.stack([page, page[:, ::-1]]))
    at_once = read_labels(path, options)
    for rows in (1, 2, 5, 12):
        by_blocks = np.zeros_like(at_once)
        for number, row0, block in label_blocks(path, options, block_px=rows * 20):
            assert len(block) <= rows
            by_blocks[number, row0 : row0 + len(block)] = block
        np.testing.assert_array_equal(by_blocks, at_once)


def test_labels_that_show_no_cells_are_named_with_what_to_do(tmp_path: Path) -> None:
    everywhere = write(tmp_path, np.arange(200, dtype=np.uint8).reshape(1, 10, 20))
    with pytest.raises(StackError, match=rf"^{everywhere} has 100% membrane between its ids"):
        read_labels(everywhere, LabelOptions(membrane_width=1))
    with pytest.raises(StackError, match=rf"^{everywhere} has the values 1, 2, 3"):
        read_labels(everywhere)
