"""Compressed and tiled pages read by rows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unet.volume import PROBABILITY_LIMITS, Limits, StackError, StackReader

PEAK = r"""
import re, sys
from unet.volume import open_volume
with open_volume(sys.argv[1]) as volume:
    for row0 in range(0, volume.height, 100):
        rows = volume.rows(0, row0, min(volume.height, row0 + 100))
        assert (rows == (volume.width + row0 // 16) % 251).any()
# Not ru_maxrss, which begins with that of the process that started this one.
print(int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) >> 10)
"""


@pytest.fixture(autouse=True)
def all_pages_are_large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "slow" not in request.keywords:
        monkeypatch.setattr("unet.volume.tiff.reader._WHOLE_PX", 0)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    dtype=st.sampled_from(["uint8", "uint16", "int16", "float32", "bool"]),
    compression=st.sampled_from([None, "zlib", "lzw", "packbits", "zstd"]),
    predictor=st.booleans(),
    tile=st.one_of(st.none(), st.tuples(st.sampled_from([16, 32, 80]), st.sampled_from([16, 48]))),
    strip=st.integers(1, 80),
    order=st.sampled_from("<>"),
    white=st.booleans(),
    data=st.data(),
)
def test_rows_are_those_of_the_whole_page(
    tmp_path: Path,
    shape: tuple[int, int, int],
    dtype: str,
    compression: str | None,
    predictor: bool,
    tile: tuple[int, int] | None,
    strip: int,
    order: str,
    white: bool,
    data: st.DataObject,
) -> None:
    limits = Limits(dtypes=(dtype,))
    pages = (np.random.default_rng(1).random(shape) * 200).astype(dtype)
    place: dict[str, Any] = {"tile": tile} if tile else {"rowsperstrip": strip}
    tifffile.imwrite(
        tmp_path / "a.tif",
        pages,
        photometric="miniswhite" if white and dtype == "uint8" else "minisblack",
        compression=compression,
        predictor=predictor and compression is not None and dtype not in ("bool", "float32"),
        byteorder=order,
        metadata=None,
        **place,
    )
    asked = data.draw(st.lists(st.tuples(st.integers(0, shape[0] - 1), *[st.integers(0, shape[1])] * 2), max_size=5))
    with StackReader(tmp_path / "a.tif", limits) as reader:
        whole = np.stack(list(reader))
        if not (white and dtype == "uint8"):
            np.testing.assert_array_equal(whole, pages)
        for page, one, other in asked:
            row0, row1 = sorted((one, other))
            if row0 < row1:
                found = reader.rows(page, row0, row1)
                assert found.dtype == reader.dtype
                np.testing.assert_array_equal(found, whole[page, row0:row1])


def test_a_tile_without_bytes_is_empty(tmp_path: Path) -> None:
    tiles = (np.full((16, 16), 7, np.uint8) if number != 2 else None for number in range(4))
    tifffile.imwrite(
        tmp_path / "a.tif", tiles, shape=(30, 30), dtype=np.uint8, tile=(16, 16), compression="zlib", photometric=1
    )
    expected = np.full((30, 30), 7, np.uint8)
    expected[16:, :16] = 0
    with StackReader(tmp_path / "a.tif") as reader:
        np.testing.assert_array_equal(reader.rows(0, 0, 30), expected)


def test_only_what_is_asked_for_is_decoded(tmp_path: Path) -> None:
    """A damaged strip is told when its rows are asked for, and the others are read."""
    pages = np.random.default_rng(0).integers(0, 255, (1, 40, 50), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric=1, compression="zlib", rowsperstrip=10, metadata=None)
    with tifffile.TiffFile(tmp_path / "a.tif") as tiff:
        offset, count = tiff.pages[0].dataoffsets[2], tiff.pages[0].databytecounts[2]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[offset : offset + count] = bytes(count)
    (tmp_path / "a.tif").write_bytes(content)
    with StackReader(tmp_path / "a.tif") as reader:
        np.testing.assert_array_equal(reader.rows(0, 0, 20), pages[0, :20])
        np.testing.assert_array_equal(reader.rows(0, 30, 40), pages[0, 30:])
        with pytest.raises(StackError, match=r"page 0 of .*a\.tif is damaged"):
            reader.rows(0, 15, 25)


def test_a_probability_that_is_no_number_is_refused_where_it_stands(tmp_path: Path) -> None:
    pages = np.zeros((1, 40, 50), np.float32)
    pages[0, 25] = np.nan
    tifffile.imwrite(tmp_path / "a.tif", pages, photometric=1, compression="zlib", rowsperstrip=10)
    with StackReader(tmp_path / "a.tif", PROBABILITY_LIMITS) as reader:
        assert not reader.rows(0, 0, 20).any()
        with pytest.raises(StackError, match=r"page 0 of .* has values that are no finite numbers"):
            reader.rows(0, 15, 30)


def test_too_much_at_once_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    page = np.zeros((1, 100, 100), np.uint8)
    limits = Limits(max_pixels_at_once=5000)
    tifffile.imwrite(tmp_path / "one.tif", page, photometric=1, compression="zlib", rowsperstrip=100)
    with pytest.raises(StackError, match=r"tiles of 10000 pixels in a row, more than the 5000 .* in smaller tiles"):
        StackReader(tmp_path / "one.tif", limits)
    # A tile may be larger than its page.
    tifffile.imwrite(tmp_path / "tile.tif", page[:, :10, :10], photometric=1, compression="zlib", tile=(128, 128))
    with pytest.raises(StackError, match="tiles of 16384 pixels in a row"):
        StackReader(tmp_path / "tile.tif", limits)
    tifffile.imwrite(tmp_path / "many.tif", page, photometric=1, compression="zlib", rowsperstrip=10)
    with StackReader(tmp_path / "many.tif", limits) as reader:
        assert reader.rows(0, 95, 100).shape == (5, 100)
        with pytest.raises(StackError, match="slices of 100 x 100 pixels, and here they are read whole, up to 5000"):
            reader[0]


@pytest.mark.slow
def test_a_compressed_slice_of_40_000_is_read_in_little_memory(tmp_path: Path, project_root: Path) -> None:
    side, tile = 40_000, 256
    across = -(-side // tile)
    tiles = (
        (np.full((tile, tile), side, np.int64) + (number // across * tile + np.arange(tile))[:, None] // 16) % 251
        for number in range(across * across)
    )
    path = tmp_path / "large.tif"
    tifffile.imwrite(
        path,
        (one.astype(np.uint8) for one in tiles),
        shape=(side, side),
        dtype=np.uint8,
        tile=(tile, tile),
        compression="zlib",
        photometric=1,
    )
    environment = {**os.environ, "PYTHONPATH": str(project_root)}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 256
