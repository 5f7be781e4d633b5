from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from export.errors import ExportError
from export.gate.tiles import Source, data_folder, distinct_tiles, gather_tiles
from unet.geometry import plan_tiles
from unet.intensity import to_uint8
from unet.intensity.percentiles import measure
from unet.volume import StackReader, StackWriter


def test_a_batch_of_the_first_size_and_one_tile_of_each_other(data_dir: Path) -> None:
    tiles = gather_tiles(Source(data_dir), (204, 220, 572))
    assert [batch.shape for batch in tiles.batches] == [(3, 1, 204, 204), (1, 1, 220, 220), (1, 1, 572, 572)]
    assert all(batch.dtype == np.uint8 for batch in tiles.batches)
    assert tiles.count == 5
    assert tiles.source == f"pages 0, 2, 3 of {data_dir / 'train-volume.tif'}"
    flat = {batch.tobytes() for batch in tiles.batches[0]}
    assert len(flat) == 3


def test_pages_that_training_did_not_see_come_first(data_dir: Path) -> None:
    tiles = gather_tiles(Source(data_dir, {"train-volume.tif": [1, 3, 99], "another.tif": [0]}), (204,))
    assert tiles.source == f"held-out pages 1, 3 of {data_dir / 'train-volume.tif'}"
    with StackReader(data_dir / "train-volume.tif") as reader:
        plan = plan_tiles(reader.height, reader.width, 204)
        np.testing.assert_array_equal(tiles.batches[0][0, 0], plan.extract(reader[1], plan.tiles[0]))
        np.testing.assert_array_equal(tiles.batches[0][1, 0], plan.extract(reader[3], plan.tiles[1]))


def test_the_stack_with_pages_that_training_did_not_see_comes_first(tmp_path: Path) -> None:
    for name in ("a-volume.tif", "b-volume.tif"):
        with StackWriter(tmp_path / name, None, np.uint8) as writer:
            writer.append(np.zeros((20, 20), np.uint8))
    assert gather_tiles(Source(tmp_path, {"b-volume.tif": [0]}), (204,)).source == (
        f"held-out pages 0 of {tmp_path / 'b-volume.tif'}"
    )
    assert gather_tiles(Source(tmp_path), (204,)).source == f"pages 0 of {tmp_path / 'a-volume.tif'}"


def test_sixteen_bits_are_windowed_over_the_stack(tmp_path: Path) -> None:
    pages = np.random.default_rng(0).integers(1000, 9000, (2, 204, 204), dtype=np.uint16)
    with StackWriter(tmp_path / "a-volume.tif", None, np.uint16) as writer:
        for page in pages:
            writer.append(page)
    tile = gather_tiles(Source(tmp_path), (572,)).batches[0][0, 0]
    plan = plan_tiles(204, 204, 572)
    expected = plan.extract(to_uint8(pages[0], measure(pages).window), plan.tiles[0])
    np.testing.assert_array_equal(tile, expected)


def test_without_data_the_synthetic_stack_is_named() -> None:
    tiles = gather_tiles(Source(None), (204,))
    assert "synthetic" in tiles.source
    assert np.std(tiles.batches[0]) > 5


def test_a_folder_without_a_stack_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"has no \*-volume\.tif"):
        gather_tiles(Source(tmp_path), (204,))


@pytest.mark.parametrize("size", [204, 284, 700])
def test_no_two_tiles_of_a_batch_are_the_same(data_dir: Path, size: int) -> None:
    tiles = distinct_tiles(Source(data_dir, {"train-volume.tif": [1, 3]}), size, 16)
    assert tiles.shape == (16, 1, size, size)
    assert tiles.dtype == np.uint8
    assert len({tile.tobytes() for tile in tiles}) == 16


def test_one_uniform_page_gives_tiles_that_differ_too(tmp_path: Path) -> None:
    with StackWriter(tmp_path / "a-volume.tif", None, np.uint8) as writer:
        writer.append(np.zeros((20, 20), np.uint8))
    assert len({tile.tobytes() for tile in distinct_tiles(Source(tmp_path), 204, 16)}) == 16


def test_the_data_folder_is_the_named_one_else_the_environments(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATA_DIR", str(data_dir))
    assert data_folder(None) == data_dir
    assert data_folder(tmp_path) == tmp_path
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    assert data_folder(None) is None
