"""Which slices train, validate and are scored, and that no pixel does two of these."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import assume, given
from hypothesis import strategies as st

from train.config import FOLDS, TrainConfig
from train.errors import TrainError
from train.input.split import Data, Part, StackSplit, fold_of, load_data, recorded_splits, split_stack
from train.input.store import load_stack
from unet.geometry import HALO
from unet.phantom import synthetic_stack
from unet.volume import LabelOptions, StackError

Make = Callable[..., TrainConfig]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a stack and its labels under a name."""

    def stack(images: object, labels: object, name: str = "train") -> Path:
        for kind, array in (("volume", images), ("labels", labels)):
            tifffile.imwrite(tmp_path / f"{name}-{kind}.tif", array, photometric="minisblack")
        return tmp_path

    return stack


@given(count=st.integers(0, 200))
def test_folds_partition_the_slices(count: int) -> None:
    assert [index for fold in range(FOLDS) for index in fold_of(count, fold)] == list(range(count))


def test_fold_4_of_the_challenge_is_24_to_29_and_two_slices_spread_over_the_others_validate() -> None:
    split = split_stack("x", 30, 512, 4, 0.1)
    assert split.held_out.pages == (24, 25, 26, 27, 28, 29)
    assert split.validation.pages == (6, 18)
    assert split_stack("x", 30, 512, 0, 0.1).validation.pages == (12, 24)
    assert split_stack("x", 30, 512, -1, 0.1).validation.pages == (5, 15, 25)
    assert split_stack("x", 30, 512, 4, 0.0).validation.pages == ()


@given(slices=st.integers(5, 60), fold=st.integers(-1, 4), share=st.floats(0, 0.5))
def test_no_page_has_two_parts_and_some_train(slices: int, fold: int, share: float) -> None:
    split = split_stack("x", slices, 64, fold, share)
    both = [*split.held_out.pages, *split.validation.pages]
    assert len(set(both)) == len(both) < slices
    assert set(both) <= set(range(slices))


@given(slices=st.integers(1, 4), height=st.integers(64, 1200), fold=st.integers(-1, 4), share=st.floats(0, 0.3))
def test_few_slices_are_divided_by_rows_with_a_gap_as_wide_as_the_network_sees(
    slices: int, height: int, fold: int, share: float
) -> None:
    # A fold's rows, the gaps beside them, and a quarter to train on: 336 rows where there are two gaps.
    if fold >= 0 and height < 150:
        with pytest.raises(TrainError, match="too few for folds"):
            split_stack("x", slices, height, fold, share)
        return
    assume(fold < 0 or height >= 340)
    split = split_stack("x", slices, height, fold, share)
    bands = [part.rows for part in (split.held_out, split.validation) if part.rows is not None]
    assert all(0 <= first < stop <= height for first, stop in bands)
    assert (split.held_out.rows is not None) == (fold >= 0)
    if len(bands) == 2:
        before, after = sorted(bands)
        assert after[0] - before[1] >= HALO


@pytest.mark.parametrize(
    ("height", "fold", "share", "held_out", "validation"),
    [
        (1000, -1, 0.1, None, (900, 1000)),
        (1000, -1, 0.0, None, None),
        (1000, 0, 0.0, (0, 200), None),
        (1000, 0, 0.1, (0, 200), (292, 392)),
        (1000, 1, 0.108, (200, 400), (0, 108)),
        (1000, 1, 0.109, (200, 400), (492, 601)),
        (1000, 4, 0.001, (800, 1000), (676, 708)),
        # Both parts and their gaps would leave 54 of 340 rows to train on.
        (340, 0, 0.1, (0, 68), None),
    ],
)
def test_the_bands_of_few_slices(
    height: int, fold: int, share: float, held_out: tuple[int, int] | None, validation: tuple[int, int] | None
) -> None:
    split = split_stack("x", 2, height, fold, share)
    assert split.held_out == (Part((0, 1), held_out) if held_out else Part())
    assert split.validation == (Part((0, 1), validation) if validation else Part())


def test_a_fold_that_leaves_less_than_a_quarter_to_train_on_is_refused() -> None:
    with pytest.raises(TrainError, match="x has 3 slices of 250 rows, too few for folds"):
        split_stack("x", 3, 250, 2, 0.0)


def test_what_a_run_records_of_its_parts_gives_them_again() -> None:
    splits = {
        "a": StackSplit(Part((1, 2)), Part((4,))),
        "b": StackSplit(Part((0, 1), (0, 50)), Part((0, 1), (142, 180))),
        "c": StackSplit(),
    }
    record = Data(splits=splits).record()
    assert record == {
        "stacks": ["a", "b", "c"],
        "pixel_size_nm": {},
        "held_out": {"a": [1, 2]},
        "held_out_rows": {"b": [0, 50]},
        "validation": {"a": [4]},
        "validation_rows": {"b": [142, 180]},
    }
    assert recorded_splits(record, {"a": 9, "b": 2, "c": 7}) == splits
    # A stack that is not there has no pages.
    assert recorded_splits(record, {"a": 9})["b"].held_out == Part((), (0, 50))


@pytest.mark.parametrize("fold", [0, 4])
def test_training_sees_no_label_of_the_other_parts(tiny: Make, write: Callable[..., Path], fold: int) -> None:
    images, labels = synthetic_stack(slices=2, size=600, seed=2)
    config = tiny(
        data_dir=str(write(images, labels)), crossvalidation_idx=fold, validation_share=0.1, border_weight=10.0
    )
    data = load_data(config)
    assert data.record()["stacks"] == ["train-volume.tif"]
    counted = np.zeros((2, 600), bool)
    for page, item in enumerate(data.training):
        counted[page] = (item.label != 255).any(axis=1)
    for part in ("held_out", "validation"):
        rows = data.record()[f"{part}_rows"]["train-volume.tif"]
        items = getattr(data, part)
        assert len(items) == 2
        for page, item in enumerate(items):
            annotated = np.flatnonzero((item.label != 255).any(axis=1))
            np.testing.assert_array_equal(item.label[annotated], labels[page, rows[0] : rows[1]])
            # Around them is what the network sees.
            np.testing.assert_array_equal(item.image, images[page, max(0, rows[0] - HALO) : rows[1] + HALO])
            assert item.label.shape == item.image.shape
            assert item.label.dtype == np.uint8
            assert item.border is None
            assert item.name == f"train-volume.tif[{page}] rows {rows[0]} to {rows[1]}"
            # Nothing that training counts lies as near as the network sees.
            assert not counted[page, max(0, rows[0] - HALO) : rows[1] + HALO].any()
    assert counted.sum() == 2 * np.count_nonzero(counted[0]) > 2 * 150
    again = load_data(dataclasses.replace(config, crossvalidation_idx=-1), data.record())
    assert again.record() == data.record()
    np.testing.assert_array_equal(again.held_out[1].label, data.held_out[1].label)


def test_training_does_not_see_what_is_held_out(tiny: Make, phantom_dir: Path) -> None:
    data = load_data(tiny(crossvalidation_idx=2, validation_share=0.1))
    names = [[item.name for item in part] for part in (data.training, data.validation, data.held_out)]
    assert names == [[f"train-volume.tif[{page}]" for page in pages] for pages in ((0, 1, 4), (3,), (2,))]
    # What the run recorded counts, whatever the flags would say.
    other = load_data(tiny(crossvalidation_idx=4, validation_share=0.0), data.record())
    assert [item.name for item in other.held_out] == names[2]
    assert [item.name for item in other.training] == names[0]
    # A record of a version that knew no validation part.
    old = load_data(tiny(), {"held_out": {"train-volume.tif": [0]}, "settings": {}})
    assert [item.name for item in old.held_out] == ["train-volume.tif[0]"]
    assert len(old.training) == 4


def test_too_few_slices_for_folds_are_refused(tiny: Make, write: Callable[..., Path]) -> None:
    images, labels = synthetic_stack(slices=3, size=128, seed=2)
    folder = write(images, labels)
    with pytest.raises(TrainError, match=r"^train-volume\.tif has 3 slices of 128 rows, too few for folds: annotate 5"):
        load_data(tiny(data_dir=str(folder), crossvalidation_idx=0))
    data = load_data(tiny(data_dir=str(folder), validation_share=0.2))
    assert (len(data.training), len(data.validation)) == (3, 0)  # no room for a gap


def test_a_stack_of_the_run_that_is_missing_is_named(tiny: Make) -> None:
    with pytest.raises(TrainError, match=r"has no b-volume\.tif, on which the run was trained"):
        load_data(tiny(), {"stacks": ["b-volume.tif"], "settings": {}})
    for page in (5, 9):
        with pytest.raises(
            TrainError, match=rf"volume\.tif\[0\] is of a stack of 5 pages, but the run held out {page}"
        ):
            load_data(tiny(), {"stacks": ["train-volume.tif"], "held_out": {"train-volume.tif": [page]}})


def test_slices_without_annotation_are_left_out(tiny: Make, write: Callable[..., Path]) -> None:
    images, labels = synthetic_stack(slices=6, size=96, seed=2)
    sparse = labels.copy()
    sparse[[1, 3]] = 7
    sparse[0, :40] = 7
    data = load_data(tiny(data_dir=str(write(images, sparse)), ignore_label=7))
    assert [item.name[-2] for item in data.training] == ["0", "2", "4", "5"]
    assert (data.training[0].label[:40] == 255).all()
    np.testing.assert_array_equal(data.training[0].label[40:], labels[0, 40:])
    sparse[1:] = 7
    folder = write(images, sparse)
    with pytest.raises(TrainError, match=f"no slice of {folder} is left to train on: annotate more, or hold out fewer"):
        load_data(tiny(data_dir=str(folder), ignore_label=7, crossvalidation_idx=0, validation_share=0.0))


def test_the_intensity_window_of_the_flag_is_that_of_the_slices(tiny: Make) -> None:
    as_they_are = load_data(tiny()).training[0].image
    darker = load_data(tiny(window="0 510")).training[0].image
    np.testing.assert_array_equal(darker, np.rint(as_they_are / 2).astype(np.uint8))


def test_a_page_that_is_the_other_way_round_is_named(tiny: Make, write: Callable[..., Path]) -> None:
    images, labels = synthetic_stack(slices=6, size=96, seed=2)
    for page, faulty in ((3, 1 - labels[3]), (5, np.zeros_like(labels[5])), (0, np.ones_like(labels[0]))):
        wrong = labels.copy()
        wrong[page] = faulty
        folder = write(images, wrong)
        with pytest.raises(StackError, match=rf"page {page} of .*train-labels\.tif has \d+% membrane where the whole"):
            load_data(tiny(data_dir=str(folder)))
        assert len(load_data(tiny(data_dir=str(folder), membrane_value=0)).training) == 6


def test_several_stacks_and_uint16(tiny: Make, write: Callable[..., Path]) -> None:
    rng = np.random.default_rng(0)
    for name, dtype, top, shape in (("a", np.uint8, 255, (2, 40, 50)), ("b", np.uint16, 4000, (3, 30, 20))):
        write(rng.integers(0, top, shape).astype(dtype), (rng.random(shape) > 0.2).astype(np.uint8), name)
        folder = write(rng.integers(0, top, shape).astype(dtype), (rng.random(shape) > 0.2).astype(np.uint8), name)
    training = load_data(tiny(data_dir=str(folder))).training
    assert [item.name for item in training] == [
        *(f"a-volume.tif[{page}]" for page in range(2)),
        *(f"b-volume.tif[{page}]" for page in range(3)),
    ]
    assert all(item.image.dtype == np.uint8 and item.image.shape == item.label.shape for item in training)
    # The window of the 12-bit stack fills the range.
    assert max(item.image.max() for item in training if item.name.startswith("b")) == 255


LOAD = """
import sys
from pathlib import Path
from train.input.store import load_stack
from unet.volume import LabelOptions

def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return int(next(row for row in open("/proc/self/status") if row.startswith("VmHWM")).split()[1]) // 1024

folder = Path(sys.argv[1])
before = peak()
load_stack((folder / "train-volume.tif", folder / "train-labels.tif"), LabelOptions(), 0.0, in_memory=False)
print(peak() - before)
"""


def test_the_memory_of_loading_does_not_grow_with_the_stack(tmp_path: Path, project_root: Path) -> None:
    grown_mib = []
    for pages in (10, 100):
        folder = tmp_path / str(pages)
        folder.mkdir()
        for kind in ("volume", "labels"):
            stack = tifffile.memmap(folder / f"train-{kind}.tif", shape=(pages, 1000, 1000), dtype=np.uint8)
            stack[:, :, ::4] = 1
            stack[:, :, 1::4] = 1
            stack[:, :, 2::4] = 1
            stack.flush()
        line = [sys.executable, "-c", LOAD, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(project_root), "TMPDIR": str(tmp_path)}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        grown_mib.append(int(done.stdout))
    # The planes of the second stack are 171 MiB larger.
    assert grown_mib[1] < grown_mib[0] + 30


def test_planes_in_a_file_are_those_in_memory(phantom_dir: Path) -> None:
    pair = (phantom_dir / "train-volume.tif", phantom_dir / "train-labels.tif")
    kept, mapped = (load_stack(pair, LabelOptions(), 0.5, in_memory=in_memory) for in_memory in (True, False))
    for one, other in zip(kept, mapped):
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.label, other.label)
        assert one.border is not None
        assert other.border is not None
        np.testing.assert_array_equal(one.border, other.border)
        assert 0.1 < one.border.max() <= 0.5


def test_the_pixel_size_is_recorded(tiny: Make, write: Callable[..., Path]) -> None:
    images, labels = synthetic_stack(slices=2, size=300, seed=2)
    folder = write(images, labels)
    metadata = {"axes": "ZYX", "PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm"}
    tifffile.imwrite(folder / "train-volume.tif", images, photometric="minisblack", ome=True, metadata=metadata)
    record = load_data(tiny(data_dir=str(folder))).record()
    assert record["pixel_size_nm"] == {"train-volume.tif": (None, None, 4)}
