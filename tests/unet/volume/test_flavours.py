from __future__ import annotations

import os
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
from hypothesis.extra.numpy import arrays

from unet.volume import (
    PROBABILITY_LIMITS,
    StackError,
    StackMetadata,
    StackReader,
    StackWriter,
    read_images,
    read_labels,
)

Array = npt.NDArray[Any]

STACK = np.random.default_rng(0).integers(0, 256, (5, 20, 30)).astype(np.uint8)
GREY: dict[str, Any] = {"photometric": "minisblack"}
PIXEL_NM = {"PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeZ": 50.0, "PhysicalSizeZUnit": "nm"}
KEPT_BY_IMAGEJ = ("spacing", "unit", "finterval", "slices", "frames")
# How the same stack comes out of different programs.
FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {"metadata": None, "resolution": (2500, 2400), "resolutionunit": 3, "description": "fly brain"},
    "bare": {"metadata": None},
    "shaped": {"metadata": {"axes": "ZYX", "section_nm": 50}},
    "truncated": {"truncate": True},
    "truncated bigendian": {"truncate": True, "byteorder": ">"},
    "bigtiff": {"bigtiff": True},
    "bigendian": {"byteorder": ">"},
    "deflate": {"compression": "zlib", "predictor": True},
    "tiled": {"tile": (16, 16)},
    "imagej": {"imagej": True, "resolution": (0.25, 0.25), "metadata": {"axes": "ZYX", "spacing": 50.0, "unit": "nm"}},
    "imagej series": {"imagej": True, "metadata": {"axes": "TYX", "finterval": 0.5}},
    "imagej alone": {"imagej": True, "truncate": True, "metadata": {"axes": "ZYX", "unit": "nm"}},
    "ome": {"ome": True, "metadata": {"axes": "ZYX", **PIXEL_NM}},
    "ome series": {"ome": True, "metadata": {"axes": "TYX", "TimeIncrement": 0.1, **PIXEL_NM}},
}


def write(path: Path, data: Array = STACK, **options: Any) -> Path:
    tifffile.imwrite(path, data, **{**GREY, **options})
    return path


@pytest.fixture(params=sorted(FLAVOURS))
def flavoured(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write(tmp_path / "in.tif", **FLAVOURS[request.param])


def copy_as_float(source: Path, target: Path, pages: int | None = None) -> None:
    with StackReader(source) as reader, StackWriter(target, reader, np.float32) as writer:
        for page in list(reader)[:pages]:
            writer.append(page / np.float32(255))


def tags(path: Path) -> dict[str, Any]:
    """What another program sees."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        names = ("XResolution", "YResolution", "ResolutionUnit")
        imagej = dict(tiff.imagej_metadata or {})
        ome = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"] if tiff.ome_metadata else {}
        return {
            "axes": tiff.series[0].axes,
            "shape": tiff.series[0].shape,
            "tags": {name: page.tags[name].value for name in names if name in page.tags},
            "imagej": {key: imagej[key] for key in sorted(imagej) if key in KEPT_BY_IMAGEJ},
            "ome": {key: value for key, value in ome.items() if key.startswith(("Physical", "Time", "Size"))},
            "shaped": dict((tiff.shaped_metadata or ({},))[0]),
        }


def test_pages_of_every_flavour(flavoured: Path) -> None:
    with StackReader(flavoured) as reader:
        assert (len(reader), reader.pages, reader.height, reader.width) == (5, 5, 20, 30)
        assert reader.dtype == np.uint8
        for index, page in enumerate(reader):
            assert np.array_equal(page, STACK[index])
        assert np.array_equal(reader[3], STACK[3])
        with pytest.raises(IndexError, match="no page 5"):
            reader[5]
    assert np.array_equal(read_images(flavoured), STACK)


@pytest.mark.parametrize("name", sorted(FLAVOURS))
def test_two_byte_pages_of_every_flavour(name: str, tmp_path: Path) -> None:
    deep = STACK.astype(np.uint16) * 256 + 7
    path = write(tmp_path / "in.tif", deep, **FLAVOURS[name])
    images = read_images(path)
    assert images.dtype == np.dtype(np.uint16)
    assert np.array_equal(images, deep)


def test_a_copy_keeps_tags_of_every_flavour(flavoured: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.tif"
    copy_as_float(flavoured, target)
    before, after = tags(flavoured), tags(target)
    before["shaped"].pop("truncated", None)
    if before["tags"] == {} or before["tags"]["XResolution"] == (1, 1):
        # No pixel size: whatever is written for none says so, too.
        assert after["tags"].get("XResolution", (1, 1)) == (1, 1)
        before["tags"] = after["tags"] = {}
    assert after == before
    with StackReader(target, PROBABILITY_LIMITS) as reader:
        assert (reader.dtype, reader.pages) == (np.dtype(np.float32), 5)
        assert np.array_equal(np.stack(list(reader)), STACK / np.float32(255))
        with StackReader(flavoured) as source:
            assert reader.metadata == source.metadata


@pytest.mark.parametrize("name", ["imagej", "ome", "shaped", "plain"])
def test_a_copy_of_some_pages_says_how_many(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "in.tif", **FLAVOURS[name])
    copy_as_float(source, tmp_path / "out.tif", pages=2)
    assert tags(tmp_path / "out.tif")["shape"] == (2, 20, 30)
    with StackReader(tmp_path / "out.tif", PROBABILITY_LIMITS) as reader:
        assert reader.pages == 2


def test_a_hyperstack_keeps_its_axes(tmp_path: Path) -> None:
    data = STACK[:4].reshape(2, 2, 20, 30)
    for name, options in (("imagej", {"imagej": True}), ("ome", {"ome": True})):
        source = write(tmp_path / f"{name}.tif", data, metadata={"axes": "TZYX"}, **options)
        copy_as_float(source, tmp_path / "out.tif")
        assert tags(tmp_path / "out.tif")["axes"] == "TZYX"
        assert np.array_equal(read_images(source), STACK[:4])


def test_a_micrometre_is_written_as_imagej_writes_it(tmp_path: Path) -> None:
    kept = StackMetadata("imagej", extra={"unit": "µm"})
    with StackWriter(tmp_path / "out.tif", kept, np.uint8) as writer:
        writer.append(STACK[0])
    assert b"unit=\\u00B5m" in (tmp_path / "out.tif").read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    data=st.one_of(
        *(
            arrays(dtype, st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)))
            for dtype in (np.uint8, np.uint16)
        ),
        arrays(
            np.float32,
            st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
            elements=st.floats(0, 1, width=32),
        ),
    ),
    flavour=st.sampled_from(["tiff", "imagej", "ome", "shaped"]),
    resolution=st.one_of(st.none(), st.tuples(st.integers(1, 10_000), st.integers(1, 10_000))),
)
def test_what_is_written_is_read(
    tmp_path: Path, data: Array, flavour: str, resolution: tuple[float, float] | None
) -> None:
    path = tmp_path / "out.tif"
    kept = StackMetadata(flavour, resolution, 3)
    with StackWriter(path, kept, data.dtype) as writer:
        for page in data:
            writer.append(page)
    with StackReader(path, PROBABILITY_LIMITS) as reader:
        assert np.array_equal(np.stack(list(reader)), data)
        assert reader.metadata.flavour == flavour
        assert reader.metadata.resolution == (resolution or (1, 1))
    assert np.array_equal(tifffile.imread(path).reshape(data.shape), data)


def test_nothing_appears_unless_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out.tif"
    target.write_bytes(b"the former run's")

    def fail() -> None:
        with StackWriter(target, None, np.uint8) as writer:
            writer.append(STACK[0])
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    with pytest.raises(StackError, match="was given no slices"), StackWriter(target, None, np.uint8):
        pass
    # What stopped the writing is not covered by what follows from it.
    with pytest.raises(InterruptedError), StackWriter(target, None, np.uint8):
        raise InterruptedError
    assert target.read_bytes() == b"the former run's"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("page", [np.zeros((20, 31)), np.zeros((1, 20, 30)), np.zeros((0, 30))])
def test_a_page_that_does_not_belong(tmp_path: Path, page: Array) -> None:
    def append() -> None:
        with StackWriter(tmp_path / "out.tif", None, np.uint8) as writer:
            writer.append(STACK[0])
            writer.append(page)

    with pytest.raises(StackError, match="takes slices of 20 x 30: one of shape"):
        append()
    with pytest.raises(StackError, match="cannot hold float64"):
        StackWriter(tmp_path / "out.tif", None, np.float64)


def test_reading_and_writing_take_the_memory_of_pages_not_of_stacks(tmp_path: Path) -> None:
    page = np.zeros((512, 512), np.uint8)
    source = write(tmp_path / "in.tif", np.repeat(page[None], 60, 0), imagej=True)
    tracemalloc.start()
    with StackReader(source) as reader, StackWriter(tmp_path / "out.tif", reader, np.float32) as writer:
        for plane in reader:
            writer.append(plane / np.float32(255))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 4 * page.size


def test_a_stack_beyond_4_gb_becomes_a_bigtiff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bound brought down: nobody's disk needs 4 GB for this."""
    monkeypatch.setattr("unet.volume.tiff.writer.CLASSIC_TIFF_BYTES", 5 * 20 * 30 * 4 - 1)
    source = write(tmp_path / "in.tif", **FLAVOURS["imagej"])
    copy_as_float(source, tmp_path / "out.tif")
    with tifffile.TiffFile(tmp_path / "out.tif") as tiff:
        assert tiff.is_bigtiff
    assert tags(tmp_path / "out.tif")["imagej"] == {"spacing": 50.0, "unit": "nm", "slices": 5}

    def write_unannounced() -> None:
        with StackWriter(tmp_path / "b.tif", None, np.float32) as writer:
            for plane in STACK:
                writer.append(plane)

    with pytest.raises(StackError, match="grows beyond 4 GB"):
        write_unannounced()


def test_imagej_pages_beyond_4_gb_are_found(tmp_path: Path) -> None:
    """ImageJ's one directory and then 4.3 GB of slices, in a sparse file that takes no room."""
    path = tmp_path / "large.tif"
    side, count = 8192, 65
    header = struct.pack("<2sHI", b"II", 42, 8)
    text = f"ImageJ=1.54f\nimages={count}\nslices={count}\nunit=nm\nspacing=50.0\n\0".encode()
    entries = [
        *((256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((270, 2, len(text), 200), (273, 4, 1, 400), (277, 3, 1, 1), (278, 4, 1, side), (279, 4, 1, side * side)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    with path.open("wb") as stream:
        stream.write(header + directory + bytes(4))
        stream.seek(200)
        stream.write(text)
        stream.seek(400 + (count - 1) * side * side + 5)
        stream.write(b"\x07")
        stream.truncate(400 + count * side * side)
    with StackReader(path) as reader:
        assert (reader.pages, reader.height, reader.width) == (count, side, side)
        assert reader[count - 1][0, :7].tolist() == [0, 0, 0, 0, 0, 7, 0]
        assert reader.metadata.extra == {"unit": "nm", "spacing": 50.0}
    os.truncate(path, 400 + count * side * side - 1)
    with pytest.raises(StackError, match="truncated or damaged"):
        StackReader(path)


def test_dark_stays_dark_where_white_is_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "in.tif", STACK, photometric="miniswhite")
    assert np.array_equal(read_images(path), 255 - STACK)


def test_labels_of_any_two_values(tmp_path: Path) -> None:
    truth = (STACK > 60).astype(np.uint8)
    for value, dtype in ((1, np.uint8), (255, np.uint8), (65535, np.uint16)):
        path = write(tmp_path / "labels.tif", (truth * value).astype(dtype))
        labels = read_labels(path)
        assert labels.dtype == np.uint8
        assert np.array_equal(labels, truth)
