from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import adapted_rand_error, variation_of_information

from unet.errors import UnetError
from unet.scores import Overlaps, VolumeScores, score_volumes
from unet.scores.__main__ import main
from unet.volume import open_volume


def scores_by_block(
    truth: npt.NDArray[Any], segments: npt.NDArray[Any], blocks: int, ignored: int | None = 0
) -> VolumeScores:
    overlaps = Overlaps(ignored)
    for one, other in zip(np.array_split(truth, blocks), np.array_split(segments, blocks)):
        overlaps.add(one, other)
    return overlaps.scores()


@given(seed=st.integers(0, 2**32), cells=st.integers(1, 40), blocks=st.integers(1, 9), ignore=st.booleans())
def test_the_scores_are_scikit_images(seed: int, cells: int, blocks: int, ignore: bool) -> None:
    random = np.random.default_rng(seed)
    shape = tuple(random.integers(2, 12, 3))
    truth = random.integers(0, cells + 1, shape)
    truth[0, 0] = 1
    # Some voxels of each cell get another cell's id.
    segments = np.where(random.random(shape) < random.random(), truth, random.integers(0, cells + 1, shape))
    found = scores_by_block(truth, segments, blocks, 0 if ignore else None)
    ignored = (0,) if ignore else ()
    split, merge = variation_of_information(truth, segments, ignore_labels=ignored)
    error, _, _ = adapted_rand_error(truth, segments, ignore_labels=ignored)
    assert (found.split, found.merge) == pytest.approx((split, merge), abs=1e-9)
    assert found.rand_error == pytest.approx(0.0 if np.isnan(error) else error, abs=1e-9)
    assert found.voxels == np.count_nonzero(truth) if ignore else truth.size


def test_pairs_that_wait_are_summed_without_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    truth, segments = random.integers(0, 9, (2, 9, 16, 16))
    at_once = scores_by_block(truth, segments, 1)
    monkeypatch.setattr("unet.scores.volumes._MOST_PENDING", 1)
    for blocks in (2, 9):
        assert scores_by_block(truth, segments, blocks) == at_once


def test_without_any_pair_nothing_is_told_apart_wrongly() -> None:
    ids = np.arange(1, 9).reshape(2, 2, 2)
    assert scores_by_block(ids, ids[::-1], 1) == VolumeScores(0.0, 0.0, 0.0, 8)


def test_all_slices_are_scored_unless_some_are_named(tmp_path: Path) -> None:
    truth = np.ones((3, 20, 30), np.uint8)
    segments = truth.copy()
    segments[2, :10] = 2
    for name, ids in (("truth", truth), ("found", segments)):
        tifffile.imwrite(tmp_path / f"{name}.tif", ids, photometric="minisblack")
    with open_volume(tmp_path / "truth.tif") as one, open_volume(tmp_path / "found.tif") as other:
        assert score_volumes(one, other) == scores_by_block(truth, segments, 3)
        assert score_volumes(one, other, range(2)).variation == 0


def test_a_split_is_no_merge() -> None:
    truth = np.ones((4, 8, 8), np.uint64)
    halves = truth.copy()
    halves[:2] = 2**63 + 5  # ids use all bits
    assert (scores_by_block(truth, halves, 3).split, scores_by_block(truth, halves, 3).merge) == (1.0, 0.0)
    assert (scores_by_block(halves, truth, 3).split, scores_by_block(halves, truth, 3).merge) == (0.0, 1.0)
    same = scores_by_block(halves, halves.astype(np.int64, casting="unsafe"), 2)
    assert (same.variation, same.rand_error, same.voxels) == (0.0, 0.0, truth.size)


def test_memory_follows_the_block_and_not_the_volume() -> None:
    random = np.random.default_rng(0)
    block = np.repeat(random.integers(1, 500, (16, 256, 32), np.uint32), 8, axis=2)
    overlaps = Overlaps()
    overlaps.add(block, block)
    tracemalloc.start()
    for _ in range(3):
        overlaps.add(block, block)
    _, few = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    for _ in range(60):
        overlaps.add(block, block)
    _, many = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert many < 2 * few
    assert overlaps.scores().variation == 0


def test_the_command_scores_volumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(3)
    truth = np.kron(random.integers(0, 6, (3, 4, 5)), np.ones((2, 10, 10), int)).astype(np.uint16)
    segments = np.where(truth == 5, 4, truth).astype(np.uint32)
    segments[:, :20][truth[:, :20] == 2] = 9
    tifffile.imwrite(tmp_path / "truth.tif", truth)
    tifffile.imwrite(tmp_path / "found.tif", segments)
    line = ["--volume", str(tmp_path / "found.tif"), str(tmp_path / "truth.tif"), "--json"]
    for words, part, ignored in (([], slice(None), 0), (["--pages", "2:5", "--ignore_label", "3"], slice(2, 5), 3)):
        assert main([*line, *words]) == 0
        found = json.loads(capsys.readouterr().out)
        wanted = variation_of_information(truth[part], segments[part], ignore_labels=(ignored,))
        assert (found["split"], found["merge"]) == pytest.approx(tuple(wanted))
        assert found["variation"] == pytest.approx(sum(wanted))
        error = adapted_rand_error(truth[part], segments[part], ignore_labels=(ignored,))[0]
        assert found["rand_error"] == pytest.approx(error)
    assert main(line[:-1]) == 0
    assert "6 slices: variation of information" in capsys.readouterr().out


def test_volumes_that_cannot_be_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "empty.tif", np.zeros((3, 20, 30), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "short.tif", np.ones((2, 20, 30), np.uint8), photometric="minisblack")
    for line, sentence in (
        (["short.tif", "empty.tif"], "short.tif is (2, 20, 30) but"),
        (["empty.tif", "empty.tif"], "the truth has no cell"),
        (["empty.tif", "empty.tif", "--membrane_width", "3"], "leave them out with --volume"),
        (["empty.tif", "short.tif", "--pages", "0:9"], "outside the stack's 0:2"),
    ):
        names = [str(tmp_path / word) if word.endswith(".tif") else word for word in line]
        assert main(["--volume", *names]) == 2
        assert sentence in capsys.readouterr().err
    with pytest.raises(UnetError, match="no cell"):
        Overlaps().scores()
