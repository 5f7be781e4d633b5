from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from export.errors import ParityError
from export.gate.scoring import Judge, ScoredSlices, gather_scored
from export.gate.tiles import Source
from unet.phantom import synthetic_stack
from unet.scores import score_stack
from unet.volume import LabelOptions, StackError

SIZE = 204


@pytest.fixture(scope="module")
def slices() -> ScoredSlices:
    images, labels = synthetic_stack(slices=3, size=96, seed=2)
    return ScoredSlices(images, labels, SIZE)


def oracle(slices: ScoredSlices, erode: bool = False) -> np.ndarray:  # type: ignore[type-arg]
    """A perfect network's probabilities, float32 [n, H, W]; or one that loses the membrane of one slice."""
    found = slices.labels.astype(np.float32)
    if erode:
        found[1] = 1
    return found


def as_engine(slices: ScoredSlices, probabilities: np.ndarray):  # type: ignore[no-untyped-def,type-arg]
    """An engine that knows its answers by the tiles: what `ScoredSlices.predict` cuts, looked up."""
    known = {}
    whole = ScoredSlices(np.asarray(probabilities * 255, np.uint8), slices.labels, SIZE)
    for asked, answers in zip(slices.tiles(), whole.tiles()):
        for tile, answer in zip(asked, answers):
            known[tile.tobytes()] = (answer[:, 92:-92, 92:-92] / 255).astype(np.float16)
    return lambda tiles: np.stack([known[tile.tobytes()] for tile in tiles])


def test_tiles_are_put_together_as_they_were_cut(slices: ScoredSlices) -> None:
    def middle(tiles: Any) -> Any:
        return tiles[:, :, 92:-92, 92:-92].astype(np.float16)

    np.testing.assert_array_equal(slices.assemble([middle(tiles) for tiles in slices.tiles()]), slices.images)
    np.testing.assert_array_equal(slices.predict(middle), slices.images)


def test_the_same_answers_keep_the_scores(slices: ScoredSlices) -> None:
    judge = Judge.of(slices, oracle(slices), "saved_model")
    assert judge.before == score_stack(oracle(slices), slices.labels)
    change = judge.judge("engine", as_engine(slices, oracle(slices)), 0.9999).check()
    assert (change.v_rand, change.ratio, change.at_threshold) == (1.0, 1.0, 1.0)


def test_a_shift_below_the_clients_threshold_is_shown(slices: ScoredSlices) -> None:
    """The best threshold moves along with the answers; a client's does not."""
    judge = Judge.of(slices, oracle(slices), "saved_model")
    change = judge.judge("engine", as_engine(slices, oracle(slices) * 0.45), 0.9999).check()
    assert change.threshold == 0.5
    assert change.ratio == 1.0
    assert change.at_threshold < 0.5


def test_merged_cells_are_refused_with_the_figure(slices: ScoredSlices, tmp_path: Path) -> None:
    judge = Judge.of(slices, oracle(slices), "saved_model")
    bad = as_engine(slices, oracle(slices, erode=True))
    change = judge.judge("engine", bad, 0.995)
    assert 0.3 < change.ratio < 0.9
    # At one threshold there is no better one to choose.
    assert change.at_threshold <= change.ratio
    with pytest.raises(ParityError, match=rf"engine keeps only {change.ratio:.4f} of .* 0\.995 is the least"):
        change.check()
    assert judge.worst_slice_png(tmp_path / "worst.png", bad) == pytest.approx((slices.labels[1] == 0).mean(), rel=1e-3)
    with Image.open(tmp_path / "worst.png") as opened:
        panels = np.asarray(opened)
    assert panels.shape == (96, 4 * 96 + 3 * 8)
    np.testing.assert_array_equal(panels[:, :96], slices.images[1])
    np.testing.assert_array_equal(panels[:, -96:] > 0, slices.labels[1] == 0)


def test_only_labelled_slices_that_training_did_not_see(tmp_path: Path) -> None:
    images, labels = synthetic_stack(slices=4, size=96, seed=2)
    labels[2] = 0
    tifffile.imwrite(tmp_path / "train-volume.tif", images, photometric="minisblack")
    held_out = {"train-volume.tif": [1, 2, 3]}
    assert gather_scored(Source(tmp_path, held_out), (SIZE, 284)) is None
    tifffile.imwrite(tmp_path / "train-labels.tif", labels * 255, photometric="minisblack")
    with pytest.raises(StackError, match="membrane"):
        gather_scored(Source(tmp_path, held_out), (SIZE, 284))
    found = gather_scored(Source(tmp_path, held_out, LabelOptions(membrane_value=0)), (SIZE, 284))
    assert found is not None
    np.testing.assert_array_equal(found.images, images[[1, 3]])
    np.testing.assert_array_equal(found.labels, labels[[1, 3]])
    assert found.tile_size == 284
    assert gather_scored(Source(tmp_path, {}), (SIZE,)) is None
    assert gather_scored(Source(None, held_out), (SIZE,)) is None
    assert gather_scored(Source(tmp_path, {"other-volume.tif": [0]}), (SIZE,)) is None
