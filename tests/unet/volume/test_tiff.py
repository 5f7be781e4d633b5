from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unet.volume import (
    PROBABILITY_LIMITS,
    Limits,
    StackError,
    StackReader,
    StackWriter,
    load_pair,
    page_range,
    read_images,
    read_labels,
)

RNG = np.random.default_rng(0)
PAGES = RNG.integers(0, 255, (4, 20, 30), np.uint8)
WIDE = RNG.integers(0, 65535, (4, 20, 30)).astype(np.uint16)

FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {"metadata": None},
    "shaped": {},
    "bigtiff": {"bigtiff": True},
    "imagej": {"imagej": True},
    "ome": {"ome": True},
    "compressed": {"compression": "zlib"},
    "bigendian": {"byteorder": ">"},
}


def write(path: Path, data: np.ndarray, **options: Any) -> Path:  # type: ignore[type-arg]
    tifffile.imwrite(path, data, photometric="minisblack", **options)
    return path


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("data", [PAGES, WIDE], ids=["uint8", "uint16"])
def test_reads_every_flavour(tmp_path: Path, flavour: str, data: np.ndarray) -> None:  # type: ignore[type-arg]
    with StackReader(write(tmp_path / "a.tif", data, **FLAVOURS[flavour])) as reader:
        assert (len(reader), reader.height, reader.width, reader.dtype) == (4, 20, 30, data.dtype)
        np.testing.assert_array_equal(np.stack(list(reader)), data)
        np.testing.assert_array_equal(reader[2], data[2])
        with pytest.raises(IndexError):
            reader[4]


def test_reads_imagejs_form_of_large_stacks(tmp_path: Path) -> None:
    """One directory, then all slices without a gap: what ImageJ writes from 4 GB on."""
    path = tmp_path / "large.tif"
    with tifffile.TiffWriter(path, imagej=True) as writer:
        writer.write(WIDE, photometric="minisblack", truncate=True)
    with tifffile.TiffFile(path) as tiff:
        assert len(tiff.pages) == 1
    np.testing.assert_array_equal(read_images(path), WIDE)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StackError, match="truncated"):
        StackReader(path)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pages=st.integers(1, 5),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    dtype=st.sampled_from(("uint8", "uint16", "float32")),
)
def test_what_is_written_is_read(tmp_path: Path, pages: int, height: int, width: int, dtype: str) -> None:
    data = (np.random.default_rng(0).random((pages, height, width)) * 200).astype(dtype)
    path = tmp_path / "round.tif"
    with StackWriter(path, None, np.dtype(dtype)) as writer:
        for page in data:
            writer.append(page)
    with StackReader(path, Limits(dtypes=("uint8", "uint16", "float32"))) as reader:
        np.testing.assert_array_equal(np.stack(list(reader)), data)


def probability_beside(source: Path) -> Path:
    """A float stack written like ``source``."""
    target = source.with_name("probability.tif")
    with StackReader(source) as reader, StackWriter(target, reader, np.float32) as writer:
        for page in reader:
            writer.append(page / np.float32(255))
    return target


def test_imagej_pixel_size_is_kept(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "spacing": 50.0, "unit": "nm"}
    source = write(tmp_path / "a.tif", PAGES, imagej=True, resolution=(0.25, 0.25), metadata=metadata)
    with tifffile.TiffFile(probability_beside(source)) as tiff:
        assert tiff.is_imagej
        assert tiff.imagej_metadata is not None
        assert (tiff.imagej_metadata["spacing"], tiff.imagej_metadata["unit"]) == (50.0, "nm")
        assert tiff.series[0].shape == (4, 20, 30)
        tag = tiff.pages.first.tags["XResolution"].value
        assert tag[0] / tag[1] == pytest.approx(0.25)
        np.testing.assert_allclose(tiff.asarray(), PAGES / np.float32(255))


def test_ome_pixel_size_is_kept(tmp_path: Path) -> None:
    metadata = {"axes": "ZYX", "PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeZ": 50.0}
    source = write(tmp_path / "a.ome.tif", PAGES, ome=True, metadata=metadata)
    with tifffile.TiffFile(probability_beside(source)) as tiff:
        assert tiff.is_ome
        assert 'PhysicalSizeX="4.0"' in (tiff.ome_metadata or "")
        assert 'PhysicalSizeXUnit="nm"' in (tiff.ome_metadata or "")
        assert 'PhysicalSizeZ="50.0"' in (tiff.ome_metadata or "")
        np.testing.assert_allclose(tiff.asarray().reshape(PAGES.shape), PAGES / np.float32(255))


def test_plain_resolution_and_description_are_kept(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.tif", PAGES, metadata=None, resolution=(2000, 1000), resolutionunit=3, description="larva"
    )
    with tifffile.TiffFile(probability_beside(source)) as tiff:
        tags = tiff.pages.first.tags
        assert [tags[name].value[0] / tags[name].value[1] for name in ("XResolution", "YResolution")] == [2000, 1000]
        assert int(tags["ResolutionUnit"].value) == 3
        assert tiff.pages.first.description == "larva"
        assert len(tiff.pages) == 4


def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", PAGES)

    def write_unequal() -> None:
        with StackWriter(path, None, np.uint8) as writer:
            writer.append(PAGES[0])
            writer.append(PAGES[0, :5])

    with pytest.raises(StackError):
        write_unequal()
    np.testing.assert_array_equal(read_images(path), PAGES)
    assert [item.name for item in tmp_path.iterdir()] == ["a.tif"]


def faults(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that cannot be read, each with its sentence."""
    whole = write(folder / "whole.tif", PAGES, metadata=None)
    cut = folder / "cut.tif"
    cut.write_bytes(whole.read_bytes()[:1700])
    head = folder / "head.tif"
    head.write_bytes(whole.read_bytes()[:6])
    text = folder / "text.tif"
    text.write_text("not an image")
    empty = folder / "empty.tif"
    empty.write_bytes(b"")
    unequal = folder / "unequal.tif"
    with tifffile.TiffWriter(unequal) as writer:
        writer.write(PAGES[0], photometric="minisblack", metadata=None)
        writer.write(PAGES[0, :10], photometric="minisblack", metadata=None)
    colour = folder / "colour.tif"
    tifffile.imwrite(colour, np.zeros((8, 8, 3), np.uint8), photometric="rgb")
    return {
        "missing": (folder / "no.tif", "does not exist"),
        "folder": (folder, "is a folder"),
        "truncated": (cut, "truncated or damaged"),
        "header only": (head, "truncated or damaged"),
        "not an image": (text, "is not a TIFF file"),
        "empty": (empty, "is empty"),
        "unequal pages": (unequal, "page 0 is 20 x 30 uint8, page 1 is 10 x 30 uint8"),
        "colour": (colour, "colour image"),
        "complex": (write(folder / "f.tif", PAGES.astype(np.complex64)), "has complex64 pixels"),
        "64-bit": (write(folder / "i.tif", PAGES.astype(np.uint64)), "has uint64 pixels"),
    }


NAMES = (
    *("missing", "folder", "truncated", "header only", "not an image", "empty"),
    *("unequal pages", "colour", "complex", "64-bit"),
)


@pytest.mark.parametrize("name", NAMES)
def test_each_fault_has_its_sentence(tmp_path: Path, name: str) -> None:
    path, sentence = faults(tmp_path)[name]
    with pytest.raises(StackError) as caught:
        StackReader(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_file_cut_anywhere_is_refused_or_says_so_when_read(tmp_path: Path, flavour: str) -> None:
    whole = write(tmp_path / "whole.tif", PAGES, **FLAVOURS[flavour]).read_bytes()
    path = tmp_path / "cut.tif"
    for length in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:length])
        try:
            pages = read_images(path)
        except StackError:
            continue
        # The cut took nothing that belongs to the pixels.
        np.testing.assert_array_equal(pages, PAGES)


def test_limits_hold_before_decoding(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.tif"
    write(bomb, np.zeros((2, 3000, 3000), np.uint8), compression="zlib")
    with pytest.raises(StackError, match="declares 3000 x 3000 pixels, more than the 1000000"):
        StackReader(bomb, Limits(max_pixels_per_page=1_000_000))
    with pytest.raises(StackError, match="declares 2 pages"):
        StackReader(bomb, Limits(max_pages=1))


def test_a_probability_that_is_not_a_number_is_refused(tmp_path: Path) -> None:
    data = np.zeros((2, 4, 4), np.float32)
    data[1, 2, 2] = np.nan
    path = write(tmp_path / "nan.tif", data)
    with StackReader(path, PROBABILITY_LIMITS) as reader, pytest.raises(StackError, match="page 1 of"):
        list(reader)


def test_labels_are_two_valued(tmp_path: Path) -> None:
    labels = (PAGES > 100).astype(np.uint8)
    np.testing.assert_array_equal(read_labels(write(tmp_path / "l.tif", labels * 255)), labels)
    np.testing.assert_array_equal(read_labels(write(tmp_path / "l.tif", labels)), labels)
    labels[1, 0, 0] = 7
    with pytest.raises(StackError, match=r"values .*1, 7"):
        read_labels(write(tmp_path / "l.tif", labels))


def test_images_and_labels_must_fit(tmp_path: Path) -> None:
    images, labels = write(tmp_path / "i.tif", PAGES), write(tmp_path / "l.tif", (PAGES > 9).astype(np.uint8))
    loaded = load_pair(images, labels)
    np.testing.assert_array_equal(loaded[0], PAGES)
    assert loaded[1].shape == PAGES.shape
    with pytest.raises(StackError, match=r"has 4 slices but .* has 3"):
        load_pair(images, write(labels, (PAGES[:3] > 9).astype(np.uint8)))
    with pytest.raises(StackError, match=r"slices of 20 x 30 but .* of\s+20 x 29"):
        load_pair(images, write(labels, (PAGES[:, :, 1:] > 9).astype(np.uint8)))


def test_the_command_line_says_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "text.tif"
    path.write_text("no")
    line = [sys.executable, "-m", "unet.scores", str(path), str(path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"error: {path} is not a TIFF file: convert it to a TIFF stack of grey slices\n"


@pytest.mark.parametrize(
    ("text", "pages"), [(":", range(9)), ("3:5", range(3, 5)), ("7:", range(7, 9)), (":2", range(2)), ("0:9", range(9))]
)
def test_a_range_of_pages(text: str, pages: range) -> None:
    assert page_range(text, 9) == pages


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("3", "is not FIRST:LAST"),
        ("a:b", "is not FIRST:LAST"),
        ("5:3", "outside"),
        ("3:10", "outside"),
        ("-2:3", "outside"),
    ],
)
def test_pages_that_are_not_there(text: str, sentence: str) -> None:
    with pytest.raises(StackError, match=sentence):
        page_range(text, 9)
