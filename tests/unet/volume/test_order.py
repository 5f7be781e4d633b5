"""Which slices a TIFF file gives, in which order, and what is said of those that it does not have."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile

from unet.volume import IMAGE_LIMITS, StackError, StackReader, StackWriter, read_images, read_labels
from unet.volume.tiff.canvas import StackCanvas

Array = npt.NDArray[Any]

STACK = np.random.default_rng(0).integers(0, 256, (6, 20, 30)).astype(np.uint8)
NAMESPACE = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def ome(path: Path, body: str, pixels: Array = STACK) -> Path:
    """A TIFF of plain pages whose first one bears an OME-XML document."""
    xml = f'<?xml version="1.0" encoding="UTF-8"?><OME xmlns="{NAMESPACE}">{body}</OME>'
    with tifffile.TiffWriter(path) as writer:
        for index, page in enumerate(pixels):
            text = xml.encode() if index == 0 else None
            writer.write(page, photometric="minisblack", metadata=None, contiguous=False, description=text)
    return path


def image(planes: str, z: int = 6, c: int = 1, order: str = "XYZCT", name: str = "a", extra: str = "") -> str:
    sizes = f'SizeX="30" SizeY="20" SizeZ="{z}" SizeC="{c}" SizeT="1"'
    return (
        f'<Image ID="Image:0" Name="{name}"><Pixels ID="Pixels:0" DimensionOrder="{order}" '
        f'Type="uint8" {sizes} {extra}>'
        f'<Channel ID="Channel:0:0" SamplesPerPixel="1"/>{planes}</Pixels></Image>'
    )


def reversed_planes() -> str:
    return "".join(f'<TiffData IFD="{5 - z}" FirstZ="{z}" PlaneCount="1"/>' for z in range(6))


def test_slices_come_in_the_order_that_ome_says(tmp_path: Path) -> None:
    path = ome(tmp_path / "a.ome.tif", image(reversed_planes()))
    assert np.array_equal(read_images(path), STACK[::-1])
    with StackReader(path) as reader:
        assert np.array_equal(reader.rows(0, 3, 9), STACK[5, 3:9])
        assert (reader.metadata.axes, reader.metadata.lengths) == ("Z", (6,))
        with StackWriter(tmp_path / "out.tif", reader, np.uint8) as writer:
            for page in reader:
                writer.append(page)
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), STACK[::-1])


def stk(path: Path, pixels: Array = STACK) -> Path:
    """What MetaMorph writes: one directory, the planes behind each other, and tags of its own."""
    count, height, width = pixels.shape
    entries: list[tuple[int, int, int, int]] = [
        *((256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)),
        *((273, 4, 1, 1000), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, height * width)),
        *((33628, 4, 3, 400), (33629, 5, count, 500)),
    ]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    content = bytearray(1000)
    content[: 8 + len(directory) + 4] = struct.pack("<2sHI", b"II", 42, 8) + directory + bytes(4)
    content[400:424] = struct.pack("<6I", 4, 440, 5, 440, 6, 450)  # calibration along x and y, and its unit
    content[440:448] = struct.pack("<2I", 4, 1000)
    content[450:457] = struct.pack("<I", 3) + b"um\0"
    content[500 : 500 + 24 * count] = b"".join(struct.pack("<6I", 1, 20, 2450000, z, 2450000, z) for z in range(count))
    path.write_bytes(bytes(content) + pixels.tobytes())
    return path


def test_a_metamorph_stack_has_all_its_planes(tmp_path: Path) -> None:
    path = stk(tmp_path / "a.stk")
    assert np.array_equal(read_images(path), STACK)
    with StackReader(path) as reader:
        assert reader.metadata.axes == "Z"
        assert reader.metadata.pixel_size_nm[1:] == pytest.approx((4, 4))
        assert np.array_equal(reader.rows(4, 2, 7), STACK[4, 2:7])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(StackError, match="truncated or damaged"):
        StackReader(path)


def test_two_positions_are_not_one_stack(tmp_path: Path) -> None:
    both = "".join(
        image(f'<TiffData IFD="{3 * index}" FirstZ="0" PlaneCount="3"/>', z=3, name=f"position {index}")
        for index in range(2)
    )
    with pytest.raises(StackError, match=r"holds 2 images \(position 0 of 3 x 20 x 30, position 1 of 3 x 20 x 30\)"):
        StackReader(ome(tmp_path / "a.ome.tif", both))


def test_missing_planes_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ome(tmp_path / "a.ome.tif", image('<TiffData IFD="0" FirstZ="0" PlaneCount="6"/>', z=30))
    assert np.array_equal(read_images(path), STACK)
    assert f"warning: {path} describes 30 slices and has 6 of them: only these are read\n" in capsys.readouterr().err


@pytest.mark.parametrize("present", [True, False])
def test_one_of_a_set_of_files_says_so(tmp_path: Path, present: bool, capsys: pytest.CaptureFixture[str]) -> None:
    planes = "".join(
        f'<TiffData IFD="0" FirstZ="{6 * index}" PlaneCount="6"><UUID FileName="{name}.ome.tif">urn:uuid:{name}</UUID>'
        "</TiffData>"
        for index, name in enumerate("abc")
    )
    path = ome(tmp_path / "a.ome.tif", image(planes, z=18))
    if present:
        for name in "bc":
            ome(tmp_path / f"{name}.ome.tif", "", STACK // 2)
    assert np.array_equal(read_images(path), STACK)
    said = capsys.readouterr().err
    assert "describes 18 slices and has 6 of them" in said
    assert ("12 are in other files" in said) == present


def test_a_companion_and_a_broken_description_do_not_stop_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, body in (
        ("companion", '<BinaryOnly MetadataFile="a.companion.ome" UUID="urn:uuid:1"/>'),
        ("broken", "<Image><Pixels"),
        ("nonsense", image('<TiffData IFD="x"/>')),
    ):
        path = ome(tmp_path / f"{name}.ome.tif", body)
        assert np.array_equal(read_images(path), STACK), name
        assert "cannot be understood" in capsys.readouterr().err


def test_axes_with_other_names_are_counted_through(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK.reshape(2, 3, 20, 30), photometric="minisblack", metadata={"axes": "HQYX"})
    with StackReader(path) as reader:
        assert np.array_equal(np.stack(list(reader)), STACK)
        with StackWriter(tmp_path / "out.tif", reader, np.uint8) as writer:
            for page in reader:
                writer.append(page)
    assert np.array_equal(read_images(tmp_path / "out.tif"), STACK)


def imagej_of_order(path: Path, order: str) -> Path:
    """Two channels of three slices, which the file counts in the order that ImageJ's key names."""
    text = f"ImageJ=1.54f\nimages=6\nchannels=2\nslices=3\nhyperstack=true\norder={order}\n"
    with tifffile.TiffWriter(path) as writer:
        for index, page in enumerate(STACK):
            about = text if index == 0 else None
            writer.write(page, photometric="minisblack", metadata=None, contiguous=False, description=about)
    return path


@pytest.mark.parametrize(("order", "axes", "channels"), [("czt", "ZC", "010101"), ("zct", "CZ", "000111")])
def test_imagejs_order_of_axes_is_read_and_written(tmp_path: Path, order: str, axes: str, channels: str) -> None:
    path = imagej_of_order(tmp_path / "a.tif", order)
    with StackReader(path) as reader:
        assert reader.metadata.axes == axes
        assert "".join(str(reader.channel_of(page)) for page in range(6)) == channels
        with StackWriter(tmp_path / "written.tif", reader, np.uint8) as writer:
            for page in reader:
                writer.append(page)
        with StackCanvas(tmp_path / "drawn.tif", reader.metadata, (6, 20, 30), np.uint8) as canvas:
            for index, page in enumerate(reader):
                canvas.write(index, 0, page)
        expected = tifffile.imread(path)
        for name in ("written", "drawn"):
            with StackReader(tmp_path / f"{name}.tif") as copy:
                assert copy.metadata == reader.metadata
                assert np.array_equal(np.stack(list(copy)), STACK)
            assert np.array_equal(tifffile.imread(tmp_path / f"{name}.tif"), expected)


def test_one_inverted_page_is_inverted_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for index, page in enumerate(STACK):
            kind = "miniswhite" if index == 2 else "minisblack"
            writer.write(255 - page if index == 2 else page, photometric=kind, metadata=None, contiguous=False)
    assert np.array_equal(read_images(path), STACK)
    with StackReader(path) as reader:
        assert np.array_equal(reader.rows(2, 1, 4), STACK[2, 1:4])


def with_tags(path: Path, **values: Any) -> Path:
    tifffile.imwrite(path, STACK, photometric="minisblack", metadata=None, resolution=(2500, 2500), resolutionunit=3)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name, value in values.items():
            tag = tiff.pages.first.tags[name]
            if isinstance(value, float):
                tag.overwrite(value, dtype="f")
            else:
                tag.overwrite(value, erase=False)
    return path


@pytest.mark.parametrize(
    ("values", "resolution", "unit"),
    [
        ({}, (2500, 2500), 3),
        ({"ResolutionUnit": 0}, (2500, 2500), 1),
        ({"ResolutionUnit": 9}, (2500, 2500), 1),
        ({"XResolution": 1250.5}, (1250.5, 2500), 3),
        ({"XResolution": -3.0}, None, 1),
        ({"XResolution": (5, 0)}, None, 1),
    ],
)
def test_a_resolution_that_cannot_be_understood_is_left_out(
    tmp_path: Path, values: dict[str, Any], resolution: tuple[float, float] | None, unit: int
) -> None:
    path = with_tags(tmp_path / "a.tif", **values)
    with StackReader(path) as reader:
        assert (reader.metadata.resolution, reader.metadata.resolution_unit) == (resolution, unit)
        assert np.array_equal(np.stack(list(reader)), STACK)
        with StackWriter(tmp_path / "out.tif", reader, np.uint8) as writer:
            writer.append(reader[0])
        StackCanvas(tmp_path / "drawn.tif", reader.metadata, (6, 20, 30), np.uint8).close()


def test_a_size_with_a_comma_is_left_out_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = 'PhysicalSizeX="4,0" PhysicalSizeXUnit="nm" PhysicalSizeY="4.0" PhysicalSizeYUnit="nm"'
    path = ome(tmp_path / "a.ome.tif", image(reversed_planes(), extra=sizes))
    with StackReader(path) as reader:
        assert np.array_equal(reader[0], STACK[5])
        assert reader.metadata.pixel_size_nm == (None, 4, None)
    said = capsys.readouterr().err
    assert said == f"warning: the PhysicalSizeX of {path} cannot be understood (4,0): it is left out\n"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 0.004, "PhysicalSizeY": 0.004}}, (None, 4, 4)),
        ({"imagej": True, "resolution": (0.25, 0.5), "metadata": {"spacing": 50, "unit": "nm"}}, (50, 2, 4)),
        ({"imagej": True, "resolution": (250, 250), "metadata": {"spacing": 0.05, "unit": "um"}}, (50, 4, 4)),
        ({"metadata": None, "resolution": (2500000, 2500000), "resolutionunit": 3}, (None, 4, 4)),
        ({"metadata": None, "resolution": (300, 300), "resolutionunit": 2}, (None, None, None)),
        ({"metadata": None}, (None, None, None)),
    ],
)
def test_the_pixel_size_of_every_flavour(tmp_path: Path, options: dict[str, Any], expected: Any) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK, photometric="minisblack", **options)
    with StackReader(path) as reader:
        for found, size in zip(reader.metadata.pixel_size_nm, expected):
            assert found == (None if size is None else pytest.approx(size))


def test_packed_pixels_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK[:1], photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages.first.tags["BitsPerSample"].overwrite(12)
    with pytest.raises(StackError, match="has packed 12-bit pixels: convert the stack"):
        StackReader(path)


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_labels_of_one_bit(tmp_path: Path, photometric: str) -> None:
    truth = STACK > 60
    stored = truth if photometric == "minisblack" else ~truth
    tifffile.imwrite(tmp_path / "a.tif", stored, photometric=photometric, metadata=None)
    assert np.array_equal(read_labels(tmp_path / "a.tif"), truth)


@pytest.mark.parametrize("compression", ["lzw", "zstd", "jpeg2000", "packbits"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_compressed_slices(tmp_path: Path, compression: str, dtype: Any) -> None:
    pytest.importorskip("imagecodecs")
    pixels = STACK.astype(dtype) * (1 if dtype == np.uint8 else 256)
    options: dict[str, Any] = {"compressionargs": {"reversible": True}} if compression == "jpeg2000" else {}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, pixels, photometric="minisblack", compression=compression, **options)
    assert np.array_equal(read_images(path), pixels)


def test_a_missing_codec_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tifffile's own stand-in for a missing imagecodecs looks for a module that only newer Pythons have."""
    pytest.importorskip("imagecodecs")
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK, photometric="minisblack", compression="zstd")
    from tifffile import _imagecodecs

    monkeypatch.setitem(tifffile.TIFF.DECOMPRESSORS._codecs, 50000, _imagecodecs.zstd_decode)
    monkeypatch.setitem(sys.modules, "compression", None)
    with (
        StackReader(path, IMAGE_LIMITS) as reader,
        pytest.raises(StackError, match=r"compressed with ZSTD: .*imagecodecs"),
    ):
        reader[0]
