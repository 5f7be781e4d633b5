from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unet.volume import PROBABILITY_LIMITS, Limits, StackError, StackReader

Array = npt.NDArray[Any]

STACK = np.random.default_rng(0).integers(0, 256, (5, 20, 30)).astype(np.uint8)
GREY: dict[str, Any] = {"photometric": "minisblack"}
DAMAGED: dict[str, dict[str, Any]] = {
    "plain": {"metadata": None, "resolution": (2500, 2400), "description": "fly brain"},
    "shaped": {"metadata": {"axes": "ZYX", "section_nm": 50}},
    "truncated": {"truncate": True},
    "bigtiff": {"bigtiff": True},
    "deflate": {"compression": "zlib", "predictor": True},
    "tiled": {"tile": (16, 16)},
    "imagej": {"imagej": True, "metadata": {"axes": "ZYX", "unit": "nm"}},
    "imagej alone": {"imagej": True, "truncate": True, "metadata": {"axes": "ZYX", "unit": "nm"}},
    "ome": {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 4.0}},
}


def write(path: Path, data: Array = STACK, **options: Any) -> Path:
    tifffile.imwrite(path, data, **{**GREY, **options})
    return path


def other_tag(path: Path, tag: str, value: int) -> None:
    write(path, STACK[:1], metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.first.tags[tag].overwrite(value)


def cyclic(path: Path) -> None:
    write(path, STACK[:2], metadata=None)
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[1].offset
    content = bytearray(path.read_bytes())
    end = offset + 2 + 12 * struct.unpack_from("<H", content, offset)[0]
    content[end : end + 4] = struct.pack("<I", offset)
    path.write_bytes(content)


BROKEN: dict[str, tuple[Any, str]] = {
    "png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), r"in.tif is not a TIFF file: convert it"),
    "no pages": (lambda path: path.write_bytes(b"II*\0" + bytes(4)), r"in.tif has no pages: save the stack again"),
    "cyclic": (cyclic, r"truncated or damaged"),
    "rgb": (
        lambda path: write(path, np.zeros((2, 20, 30, 3), np.uint8), photometric="rgb"),
        r"page 0 of .*in.tif is a colour image: convert the stack to 8- or 16-bit grey",
    ),
    "palette": (lambda path: other_tag(path, "PhotometricInterpretation", 3), r"is a colour image"),
    "64-bit": (lambda path: write(path, STACK.astype(np.uint64)), r"has uint64 pixels"),
    "1-bit": (lambda path: write(path, STACK > 9, metadata=None), r"has bool pixels"),
    "volume": (lambda path: write(path, STACK, volumetric=True), r"is not a plain two-dimensional image"),
    "no codec": (
        lambda path: other_tag(path, "Compression", 34661),
        r"compressed with JBIG: save the stack uncompressed, or `pip install imagecodecs`",
    ),
    "rows bomb": (
        lambda path: other_tag(path, "ImageLength", 2**31),
        r"page 0 of .*in.tif declares 2147483648 x 30 pixels, more than the 4294967296 that are read: cut the slices",
    ),
    "zero rows": (lambda path: other_tag(path, "ImageLength", 0), r"is not a plain two-dimensional image"),
    "short strip": (lambda path: other_tag(path, "StripByteCounts", 10), r"truncated or damaged"),
    "far strip": (lambda path: other_tag(path, "StripOffsets", 10**6), r"truncated or damaged"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_broken_file_gets_one_sentence(name: str, tmp_path: Path) -> None:
    make, sentence = BROKEN[name]
    path = tmp_path / "in.tif"
    make(path)
    with pytest.raises(StackError, match=sentence) as caught:
        StackReader(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_declared_bomb_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    path = tmp_path / "in.tif"
    other_tag(path, "ImageLength", 2**31)
    tracemalloc.start()
    with pytest.raises(StackError):
        StackReader(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_too_many_pages(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif")
    with pytest.raises(StackError, match="declares 5 pages, more than the 4 that are read"):
        StackReader(path, Limits(max_pages=4))
    # As many in words, and no directory for any of them.
    alone = write(tmp_path / "alone.tif", imagej=True, truncate=True)
    content = alone.read_bytes().replace(b"images=5", b"images=9").replace(b"slices=5", b"slices=9")
    alone.write_bytes(content)
    with pytest.raises(StackError, match="declares 9 pages"):
        StackReader(alone, Limits(max_pages=8))
    with pytest.raises(StackError, match="truncated"):
        StackReader(alone)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_probability_that_is_no_number(value: float, tmp_path: Path) -> None:
    stack = STACK.astype(np.float32)
    stack[2, 3, 4] = value
    path = write(tmp_path / "in.tif", stack)
    with StackReader(path, PROBABILITY_LIMITS) as reader:
        assert np.isfinite(reader[1]).all()
        with pytest.raises(StackError, match=r"page 2 of .*in.tif has values that are no finite numbers"):
            reader[2]


def test_damaged_pixels_are_found_when_they_are_decoded(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[2].dataoffsets[0]
    content = bytearray(path.read_bytes())
    content[offset : offset + 20] = bytes(20)
    path.write_bytes(content)
    with StackReader(path) as reader:
        reader[1]
        with pytest.raises(StackError, match=r"page 2 of .*in.tif is damaged"):
            reader[2]


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    return {name: write(folder / "in.tif", **DAMAGED[name]).read_bytes() for name in DAMAGED}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(name=st.sampled_from(sorted(DAMAGED)), data=st.data())
def test_no_damage_gets_past_as_anything_but_a_stack_error(
    tmp_path: Path, whole_files: dict[str, bytes], name: str, data: st.DataObject
) -> None:
    content = bytearray(whole_files[name])
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(content) - 1)))
    # Headers and directories lie at the start and the end; pixels, between them, are not worth the tries.
    places = st.one_of(st.integers(0, 500), st.integers(len(content) - 900, len(content) - 1))
    for place in data.draw(st.lists(places, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "in.tif"
    path.write_bytes(content[:cut])
    with contextlib.suppress(StackError), StackReader(path, PROBABILITY_LIMITS) as reader:
        for page in reader:
            assert page.shape == (reader.height, reader.width)


@pytest.mark.parametrize("name", DAMAGED)
def test_no_shortened_file_passes_for_a_whole_one(name: str, tmp_path: Path, whole_files: dict[str, bytes]) -> None:
    path = tmp_path / "in.tif"
    content = whole_files[name]
    with tifffile.TiffFile(write(tmp_path / "whole.tif", **DAMAGED[name])) as tiff:
        layout, last = tiff.tiff, tiff.pages[-1].offset
        ends = [offset + count for page in tiff.pages for offset, count in zip(page.dataoffsets, page.databytecounts)]
        if len(tiff.pages) == 1:
            ends.append(tiff.pages.first.dataoffsets[0] + STACK.nbytes)
    # Behind the last directory may lie values that a reader of pixels can do without.
    tag_count = struct.unpack_from(layout.tagnoformat, content, last)[0]
    needed = max(*ends, last + layout.tagnosize + tag_count * layout.tagsize + layout.offsetsize)
    for cut in [*range(0, needed, max(1, needed // 60)), needed - 1]:
        path.write_bytes(content[:cut])
        with pytest.raises(StackError):
            StackReader(path)
    path.write_bytes(content[:needed])
    StackReader(path).close()
