"""The same pixels in every format: read alike, with the same pixel size, and refused with a sentence."""

from __future__ import annotations

import gc
import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from unet.intensity import find_windows
from unet.volume import (
    LabelOptions,
    StackError,
    Volume,
    ZarrCanvas,
    ZarrStack,
    labels_of,
    load_pair,
    open_volume,
    read_labels,
    stacks_in,
)
from unet.volume.opening import beside

h5py = pytest.importorskip("h5py")
mrcfile = pytest.importorskip("mrcfile")
tensorstore = pytest.importorskip("tensorstore")
zarr = pytest.importorskip("zarr", minversion="3")

Array = npt.NDArray[Any]

STACK = np.random.default_rng(0).integers(0, 256, (6, 40, 50)).astype(np.uint8)
IDS = np.zeros((6, 40, 50), np.uint64)
IDS[:, :20, :], IDS[:, 20:, :25], IDS[:, 20:, 25:] = 1, 2**33, 7
SIZE_NM = (40.0, 4.0, 4.0)


def tiff(folder: Path, pixels: Array) -> Path:
    path = folder / "v.tif"
    sizes = {f"PhysicalSize{axis}": size for axis, size in zip("ZYX", SIZE_NM)}
    units = {f"PhysicalSize{axis}Unit": "nm" for axis in "ZYX"}
    tifffile.imwrite(path, pixels, photometric="minisblack", ome=True, metadata={"axes": "ZYX", **sizes, **units})
    return path


def cremi(folder: Path, pixels: Array) -> Path:
    """CREMI's layout: several data sets, of which the raw one is meant; chunks of several slices."""
    path = folder / "v.h5"
    with h5py.File(path, "w") as file:
        raw = file.create_dataset("volumes/raw", data=pixels, chunks=(4, 16, 16), compression="gzip")
        raw.attrs["resolution"] = SIZE_NM
        file.create_dataset("volumes/labels/clefts", data=np.zeros(pixels.shape, np.uint64))
        file.create_dataset("volumes/labels/neuron_ids", data=IDS[: len(pixels)])
    return path


def ilastik(folder: Path, pixels: Array) -> Path:
    """ilastik's layout: one data set with the channel behind."""
    path = folder / "v.ilastik"
    tags = {"axes": [{"key": key, "typeFlags": 2, "resolution": 0} for key in "zyxc"]}
    with h5py.File(path, "w") as file:
        data = file.create_dataset("exported_data", data=pixels[..., np.newaxis], chunks=(2, 40, 50, 1))
        data.attrs["axistags"] = json.dumps(tags)
        data.attrs["element_size_um"] = [size / 1000 for size in SIZE_NM]
    return path


def ngff(folder: Path, pixels: Array, version: str, **options: Any) -> Path:
    path = folder / "v.zarr"
    group = zarr.open_group(str(path), mode="w", zarr_format=2 if version == "0.4" else 3)
    axes = [{"name": axis, "type": "space", "unit": "nanometer"} for axis in "zyx"]
    datasets = [{"path": "s0", "coordinateTransformations": [{"type": "scale", "scale": list(SIZE_NM)}]}]
    multiscales = [{"axes": axes, "datasets": datasets}]
    if version == "0.4":
        group.attrs["multiscales"] = [{**multiscales[0], "version": version}]
    else:
        group.attrs["ome"] = {"version": version, "multiscales": multiscales}
    group.create_array("s0", shape=pixels.shape, dtype=pixels.dtype, fill_value=0, **options)[...] = pixels
    return path


def ngff_04(folder: Path, pixels: Array) -> Path:
    return ngff(folder, pixels, "0.4", chunks=(2, 16, 16))


def ngff_05_sharded(folder: Path, pixels: Array) -> Path:
    return ngff(folder, pixels, "0.5", chunks=(2, 16, 16), shards=(4, 48, 64))


def plain_zarr(folder: Path, pixels: Array) -> Path:
    path = folder / "v.zarr"
    zarr.open_group(str(path), mode="w").create_array("volumes/raw", data=pixels, chunks=(1, 40, 50))
    return Path(f"{path}:/volumes/raw")


def write_n5(path: Path, pixels: Array, **words: Any) -> None:
    """A data set as tensorstore writes it: the fastest axis comes first."""
    metadata = {
        "dataType": pixels.dtype.name,
        "dimensions": list(reversed(pixels.shape)),
        "blockSize": [16, 16, 4],
        "compression": {"type": "gzip"},
    }
    path.mkdir(parents=True, exist_ok=True)
    (path.parent / "attributes.json").write_text('{"n5": "2.5.0"}')
    spec = {"driver": "n5", "kvstore": {"driver": "file", "path": str(path)}, "metadata": {**metadata, **words}}
    tensorstore.open(spec, create=True).result()[...] = pixels.T


def n5(folder: Path, pixels: Array) -> Path:
    """N5 Viewer's layout: a pyramid with the pixel size at the full resolution."""
    size = {"dimensions": list(reversed(SIZE_NM)), "unit": "nm"}
    for level in range(2):
        write_n5(folder / "v.n5" / "raw" / f"s{level}", pixels[:, :: level + 1, :: level + 1], pixelResolution=size)
    (folder / "v.n5" / "attributes.json").write_text('{"n5": "2.5.0"}')
    return folder / "v.n5"


def mrc(folder: Path, pixels: Array) -> Path:
    path = folder / "v.map"
    with mrcfile.new(path) as file:
        file.set_data(pixels.astype(np.uint16) if pixels.dtype == np.uint8 else pixels)
        file.voxel_size = tuple(size * 10 for size in reversed(SIZE_NM))
    return path


def pictures(folder: Path, pixels: Array) -> Path:
    path = folder / "v"
    path.mkdir()
    for index, page in enumerate(pixels):
        Image.fromarray(page).save(path / f"slice{index + 6}.png")  # 9 comes before 10
    return path


def pattern(folder: Path, pixels: Array) -> Path:
    path = folder / "v"
    path.mkdir()
    for index, page in enumerate(pixels):
        tifffile.imwrite(path / f"slice{index + 6}.tif", page, photometric="minisblack", compression="zlib")
    return path / "slice*.tif"


FORMATS: dict[str, Callable[[Path, Array], Path]] = {
    maker.__name__: maker
    for maker in (tiff, cremi, ilastik, ngff_04, ngff_05_sharded, plain_zarr, n5, mrc, pictures, pattern)
}
SIZED = sorted(set(FORMATS) - {"plain_zarr", "pictures", "pattern"})


def pixels_of(volume: Volume) -> Array:
    return np.stack(list(volume))


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_pixels_in_every_format(name: str, tmp_path: Path) -> None:
    with open_volume(FORMATS[name](tmp_path, STACK)) as volume:
        assert (volume.pages, volume.height, volume.width, len(volume)) == (6, 40, 50, 6)
        assert np.array_equal(pixels_of(volume), STACK)
        for page in (5, 0, 3):  # in any order
            assert np.array_equal(volume.rows(page, 7, 33), STACK[page, 7:33])
        with pytest.raises(IndexError):
            volume.rows(6, 0, 1)
        before = volume.fingerprint()
        assert not volume.changed()
    with open_volume(volume.path) as again:
        assert again.fingerprint() == before
        assert json.loads(json.dumps(before)) == before


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"pictures"}))
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_other_pixels_and_their_window(name: str, dtype: str, tmp_path: Path) -> None:
    pixels = (STACK.astype(np.float64) * 100 - (5000 if dtype == "int16" else 0)).astype(dtype)
    with open_volume(FORMATS[name](tmp_path, pixels)) as volume:
        assert volume.dtype == np.dtype(dtype)
        assert np.array_equal(pixels_of(volume), pixels)
        windows = find_windows(volume)
    (tmp_path / "t").mkdir()
    with open_volume(tiff(tmp_path / "t", pixels)) as volume:
        assert windows.each == find_windows(volume).each


@pytest.mark.parametrize("name", SIZED)
def test_the_pixel_size_of_every_format(name: str, tmp_path: Path) -> None:
    with open_volume(FORMATS[name](tmp_path, STACK)) as volume:
        assert volume.metadata.pixel_size_nm == pytest.approx(SIZE_NM)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"cremi"}))
def test_labels_of_every_format(name: str, tmp_path: Path) -> None:
    mask = np.where(STACK > 60, np.uint8(255), np.uint8(0))
    assert np.array_equal(read_labels(FORMATS[name](tmp_path, mask)), mask // 255)


def test_cremi_is_a_pair_of_its_own(tmp_path: Path) -> None:
    path = cremi(tmp_path, STACK)
    images, labels = load_pair(path, path, LabelOptions(membrane_width=2))
    assert np.array_equal(images, STACK)
    expected = np.ones(STACK.shape, np.uint8)
    expected[:, 19:21] = 0
    expected[:, 20:, 24:26] = 0
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_change_is_noticed(name: str, tmp_path: Path) -> None:
    path = FORMATS[name](tmp_path, STACK)
    with open_volume(path) as volume:
        before = volume.fingerprint()
        if name in ("ngff_04", "ngff_05_sharded", "plain_zarr", "n5"):
            inside = tmp_path / ("v.n5/raw/s0" if name == "n5" else "v.zarr")
            files = [file for file in inside.rglob("*") if file.is_file()]
            chunk = next(file for file in files if file.name[0] != "." and file.suffix != ".json")
        elif name in ("pictures", "pattern"):
            chunk = sorted((tmp_path / "v").iterdir())[2]
        else:
            chunk = path
        content = chunk.read_bytes()
        chunk.unlink()
        chunk.write_bytes(content + b"\0")
        assert volume.changed()
        # It is of what was opened, and read once: a large file takes a while.
        assert volume.fingerprint() == before


MAKERS_OF_FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {}


def fault(sentence: str) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        MAKERS_OF_FAULTS[make.__name__] = make, sentence
        return make

    return register


@fault(r"does not say which data set is meant: name one of /a, /b behind the file, as in FILE:/a")
def several_data_sets(folder: Path) -> Path:
    with h5py.File(folder / "v.h5", "w") as file:
        file["a"], file["b"] = STACK, STACK
    return folder / "v.h5"


@fault(r"has no data set nowhere: name one of /a behind the file")
def wrong_place(folder: Path) -> Path:
    with h5py.File(folder / "v.h5", "w") as file:
        file["a"] = STACK
    return Path(f"{folder / 'v.h5'}:/nowhere")


@fault(r"whose last axis looks like channels")
def channels_behind(folder: Path) -> Path:
    with h5py.File(folder / "v.h5", "w") as file:
        file["a"] = np.zeros((5, 20, 30, 3), np.uint8)
    return folder / "v.h5"


@fault(r"v.h5 is truncated or damaged")
def cut_hdf5(folder: Path) -> Path:
    path = cremi(folder, STACK)
    path.write_bytes(path.read_bytes()[:900])
    return path


@fault(r"v.map is truncated or damaged")
def cut_mrc(folder: Path) -> Path:
    path = mrc(folder, STACK)
    path.write_bytes(path.read_bytes()[:-500])
    return path


@fault(r"has complex64 pixels: convert it")
def complex_mrc(folder: Path) -> Path:
    return mrc(folder, STACK.astype(np.complex64))


@fault(r"v.n5 has no N5 data set in it: name the folder that has one")
def n5_without_pixels(folder: Path) -> Path:
    (folder / "v.n5").mkdir()
    (folder / "v.n5" / "attributes.json").write_text('{"n5": "2.5.0"}')
    return folder / "v.n5"


@fault(r"v.n5 does not say which data set is meant: name one of /a, /b behind the folder, as in .*v.n5:/a$")
def two_n5_data_sets(folder: Path) -> Path:
    for name in "ab":
        write_n5(folder / "v.n5" / name, STACK)
    return folder / "v.n5"


@fault(r"v.n5 has no data set nowhere: name one of /a behind the folder")
def wrong_place_in_n5(folder: Path) -> Path:
    write_n5(folder / "v.n5" / "a", STACK)
    return Path(f"{folder / 'v.n5'}:/nowhere")


@fault(r"v.n5 is not N5 that can be read \(.*dataType.*\): convert it again")
def nonsense_in_n5(folder: Path) -> Path:
    write_n5(folder / "v.n5", STACK)
    words = folder / "v.n5" / "attributes.json"
    words.write_text(words.read_text().replace("uint8", "int9"))
    return folder / "v.n5"


@fault(r"is not a stack of equal slices: a1.png is 40 x 50 uint8, a2.png is 30 x 50 uint8")
def unequal_pictures(folder: Path) -> Path:
    Image.fromarray(STACK[0]).save(folder / "a1.png")
    Image.fromarray(STACK[0, :30]).save(folder / "a2.png")
    return folder


@fault(r"a.tif has 6 slices, where each file has one")
def stack_among_slices(folder: Path) -> Path:
    tifffile.imwrite(folder / "a.tif", STACK, photometric="minisblack")
    return folder


@fault(r"has no PNG, JPEG or TIFF file in it")
def empty_folder(folder: Path) -> Path:
    return folder


@fault(r"holds 2 images \(0, 1\): name one, as in .*v.zarr:/[01]")
def two_images(folder: Path) -> Path:
    group = zarr.open_group(str(folder / "v.zarr"), mode="w")
    for name in "01":
        group.create_array(name, data=STACK)
    return folder / "v.zarr"


@fault(r"neither an HDF5 file nor a Zarr or N5 folder: :/a names no place in it")
def place_in_a_tiff(folder: Path) -> Path:
    return Path(f"{tiff(folder, STACK)}:/a")


@pytest.mark.parametrize("name", MAKERS_OF_FAULTS)
def test_each_fault_has_its_sentence(name: str, tmp_path: Path) -> None:
    make, sentence = MAKERS_OF_FAULTS[name]
    with pytest.raises(StackError, match=sentence) as caught:
        open_volume(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_damaged_chunk_and_a_damaged_picture_are_named(tmp_path: Path) -> None:
    path = ngff_05_sharded(tmp_path, STACK)
    chunk = next(file for file in (path / "s0").rglob("*") if file.is_file() and file.name != "zarr.json")
    chunk.write_bytes(chunk.read_bytes()[:50])
    with open_volume(path) as volume, pytest.raises(StackError, match=r"slice \d of .*v.zarr is damaged"):
        pixels_of(volume)
    folder = pictures(tmp_path, STACK)
    cut = folder / "slice8.png"
    cut.write_bytes(cut.read_bytes()[:300])
    with open_volume(folder) as volume, pytest.raises(StackError, match=r"slice8.png is truncated or damaged"):
        pixels_of(volume)


def test_colour_that_shows_grey_is_grey(tmp_path: Path) -> None:
    Image.fromarray(np.repeat(STACK[0][..., np.newaxis], 3, axis=-1)).save(tmp_path / "a.png")
    with open_volume(tmp_path) as volume:
        assert np.array_equal(volume[0], STACK[0])
    Image.fromarray(np.stack([STACK[0], STACK[1], STACK[2]], axis=-1)).save(tmp_path / "a.png")
    with open_volume(tmp_path) as volume, pytest.raises(StackError, match=r"a.png is a colour image"):
        volume[0]


def test_what_lies_beside_slices_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pictures(tmp_path, STACK)
    for name in ("._slice6.png", "slice6.png.aux.xml", ".DS_Store", "Thumbs.db"):
        (path / name).write_bytes(b"\0\0")
    (path / "deeper").mkdir()
    with open_volume(path) as volume:
        assert np.array_equal(pixels_of(volume), STACK)
    said = capsys.readouterr().err
    assert said == f"warning: {path} has 2 files that are no slices (Thumbs.db, slice6.png.aux.xml): left out\n"


def test_a_missing_number_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = pictures(tmp_path, STACK)
    (path / "slice8.png").unlink()
    with open_volume(path) as volume:
        assert np.array_equal(pixels_of(volume), STACK[[0, 1, 3, 4, 5]])
    assert f"{path} has no slice 8 between 6 and 11" in capsys.readouterr().err


def test_the_format_is_that_of_the_content(tmp_path: Path) -> None:
    path = cremi(tmp_path, STACK)
    named = path.rename(tmp_path / "v.tif")
    with open_volume(named) as volume:
        assert np.array_equal(volume[1], STACK[1])


def test_n5_counts_its_fastest_axis_first(tmp_path: Path) -> None:
    """Blocks by hand, as the specification has them: number 1 is the second along x, and x runs fastest inside."""
    folder = tmp_path / "v.n5"
    for index in range(2):
        (folder / str(index) / "0").mkdir(parents=True)
        header = struct.pack(">HHIII", 0, 3, 3, 2, 1)
        (folder / str(index) / "0" / "0").write_bytes(header + bytes(range(6 * index, 6 * index + 6)))
    words = {"dimensions": [6, 2, 1], "blockSize": [3, 2, 1], "dataType": "uint8", "compression": {"type": "raw"}}
    (folder / "attributes.json").write_text(json.dumps(words))
    with open_volume(folder) as volume:
        assert pixels_of(volume).tolist() == [[[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"resolution": [4, 4, 40], "units": ["nm", "nm", "nm"], "axes": ["x", "y", "z"]}, ""),
        ({"pixelResolution": {"dimensions": [0.004, 0.004, 0.04], "unit": "um"}}, ""),
        ({"resolution": [4, "wide"], "units": "nm"}, "the pixel size of "),
        ({"pixelResolution": {"dimensions": 4, "unit": "nm"}}, "the pixel size of "),
        ({"axes": ["x", "x", "z"]}, "the axes of "),
        ({"units": 7, "resolution": [4, 4, 40]}, "the pixel size of "),
    ],
)
def test_words_of_n5_never_stop_a_run(
    words: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_n5(tmp_path / "v.n5", STACK)
    file = tmp_path / "v.n5" / "attributes.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))
    with open_volume(tmp_path / "v.n5") as volume:
        assert np.array_equal(pixels_of(volume), STACK)
        expected = (None, None, None) if said else pytest.approx(SIZE_NM)
        assert volume.metadata.pixel_size_nm == expected
    assert (said in capsys.readouterr().err) if said else capsys.readouterr().err == ""


def test_a_cut_n5_block_is_named(tmp_path: Path) -> None:
    write_n5(tmp_path / "v.n5", STACK)
    block = tmp_path / "v.n5" / "0" / "0" / "0"
    block.write_bytes(block.read_bytes()[:50])
    with open_volume(tmp_path / "v.n5") as volume, pytest.raises(StackError, match=r"slice 0 of .*v.n5 is damaged \("):
        volume[0]


def test_n5_names_the_extra_that_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_n5(tmp_path / "v.n5", STACK)
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(StackError, match=r"^tensorstore is not installed: pip install 'unet-medical-triton\[n5\]'$"):
        open_volume(tmp_path / "v.n5")


def test_imods_bytes_have_the_sign_that_its_header_says(tmp_path: Path) -> None:
    path = tmp_path / "v.mrc"
    with mrcfile.new(path) as file:
        file.set_data(STACK.view(np.int8))
    with open_volume(path) as volume:
        assert np.array_equal(pixels_of(volume), STACK.view(np.int8))
    content = bytearray(path.read_bytes())
    content[152:156] = struct.pack("<I", 1146047817)
    path.write_bytes(content)
    with open_volume(path) as volume:
        assert np.array_equal(pixels_of(volume), STACK)


def test_the_root_of_a_microscopes_export_is_its_only_image(tmp_path: Path) -> None:
    root = tmp_path / "v.zarr"
    group = zarr.open_group(str(root), mode="w", zarr_format=2)
    group.attrs["bioformats2raw.layout"] = 3
    image = group.create_group("0")
    axes = [{"name": name} for name in "tczyx"]
    image.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": [{"path": "0"}]}]
    image.create_array("0", data=STACK[np.newaxis, np.newaxis], chunks=(1, 1, 1, 40, 50))
    with open_volume(root) as volume:
        assert np.array_equal(pixels_of(volume), STACK)
    with open_volume(root / "0") as volume:
        assert np.array_equal(pixels_of(volume), STACK)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a.tif", ("", "a.tif")),
        ("a.h5:/volumes/raw", ("", "a-raw.tif")),
        ("a.zarr", ("", "a.zarr")),
        ("a.zarr/0", ("", "a-0.zarr")),
        ("a.zarr:/0", ("", "a-0.zarr")),
        ("a.n5", ("", "a.tif")),
        ("a.n5/raw/s0", ("", "a-s0.tif")),
        ("a.n5:/raw", ("", "a-raw.tif")),
        ("sub.v1", ("", "sub.v1.tif")),
        ("sub.v1/*.png", ("", "sub.v1.tif")),
    ],
)
def test_nothing_is_written_inside_a_volume(tmp_path: Path, source: str, expected: tuple[str, str]) -> None:
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w").create_array("0", data=STACK)
    write_n5(tmp_path / "a.n5" / "raw" / "s0", STACK)
    (tmp_path / "a.n5" / "attributes.json").write_text('{"n5": "2.5.0"}')
    (tmp_path / "sub.v1").mkdir()
    (tmp_path / "a.h5").touch()
    assert beside(tmp_path / source) == (tmp_path / expected[0], expected[1])


def test_axes_of_space_with_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ngff_05_sharded(tmp_path, STACK)
    group = zarr.open_group(str(path), mode="r+")
    words = dict(group.attrs["ome"])
    words["multiscales"][0]["axes"] = [{"name": name, "type": "space"} for name in ("depth", "row", "column")]
    group.attrs["ome"] = words
    with open_volume(path) as volume:
        assert np.array_equal(pixels_of(volume), STACK)
    assert "the last two are taken for rows and columns" in capsys.readouterr().err


def test_a_canvas_is_an_image_with_a_pyramid(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).random((2, 1100, 70)).astype(np.float32)
    (tmp_path / "in").mkdir()
    with open_volume(ngff_04(tmp_path / "in", pixels)) as volume:
        assert isinstance(volume, ZarrStack)
        canvas = ZarrCanvas(tmp_path / "out.zarr", volume, np.float32, chunk_rows=400)
        for page in range(2):
            for row0 in range(0, 1100, 400):
                canvas.write(page, row0, pixels[page, row0 : row0 + 400])
            canvas.finish_page(page)
    group = zarr.open_group(str(tmp_path / "out.zarr"), mode="r")
    assert group.attrs["ome"]["version"] == "0.5"
    datasets = group.attrs["ome"]["multiscales"][0]["datasets"]
    assert [group[one["path"]].shape for one in datasets] == [(2, 1100, 70), (2, 550, 35), (2, 275, 18)]
    scales = [one["coordinateTransformations"][0]["scale"] for one in datasets]
    assert scales == [[40, 4, 4], [40, 8, 8], [40, 16, 16]]
    assert datasets[1]["coordinateTransformations"][1] == {"type": "translation", "translation": [0, 2, 2]}
    assert np.array_equal(group["0"][...], pixels)
    halved = pixels.reshape(2, 550, 2, 35, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(group["1"][...], halved, rtol=1e-6)
    with open_volume(tmp_path / "out.zarr") as copy:
        assert copy.metadata.pixel_size_nm == pytest.approx(SIZE_NM)
        assert np.array_equal(pixels_of(copy), pixels)


def peak_of_reading(path: Path) -> int:
    """The most bytes that Python holds while all slices are read."""
    gc.collect()
    tracemalloc.start()
    with open_volume(path) as volume:
        for page in range(len(volume)):
            volume.rows(page, 0, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"pictures"}))
def test_memory_is_that_of_slices(name: str, tmp_path: Path) -> None:
    """A stack of four times as many slices is read in the same memory."""
    peaks = []
    for count in (10, 40):
        folder = tmp_path / str(count)
        folder.mkdir()
        path = FORMATS[name](folder, np.zeros((count, 100, 100), np.uint16))
        # The least of three: libraries load code at first use, and threads of other tests may allocate meanwhile.
        peaks.append(min(peak_of_reading(path) for _ in range(3)))
    # What a slice takes beside its pixels: a directory, a chunk's key, a name.
    assert peaks[1] < peaks[0] + 30 * 100 * 100


def test_stacks_and_their_labels_are_found_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "h").mkdir()
    cremi(tmp_path / "h", STACK).rename(tmp_path / "c.hdf")
    for name in ("a", "b"):
        tiff(tmp_path, STACK).rename(tmp_path / f"{name}-volume.tif")
    tiff(tmp_path, STACK).rename(tmp_path / "a-labels.tif")
    ngff_05_sharded(tmp_path, STACK).rename(tmp_path / "b-labels.zarr")
    pictures(tmp_path, STACK).rename(tmp_path / "d-volume")
    for name in ("._a-volume.tif", "a-volume.tif.aux.xml", "e-volume.txt"):
        (tmp_path / name).write_bytes(b"\0")
    tiff(tmp_path, STACK).rename(tmp_path / "a-volume-probability.tif")
    found = stacks_in(tmp_path)
    assert [path.name for path in found] == ["a-volume.tif", "b-volume.tif", "c.hdf", "d-volume"]
    labels = [labels_of(path) for path in found]
    assert labels == [tmp_path / "a-labels.tif", tmp_path / "b-labels.zarr", tmp_path / "c.hdf", None]
    assert stacks_in(tmp_path / "nowhere") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_memory_is_flat_over_3000_slices(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole process's memory, with what the formats' own libraries keep."""
    line = (
        "import sys; from unet.volume import open_volume; volume = open_volume(sys.argv[1]);"
        "sum(int(volume.rows(page, 0, volume.height)[0, 0]) for page in range(len(volume)));"
        "print(len(volume), next(row for row in open('/proc/self/status') if row.startswith('VmHWM')).split()[1])"
    )
    peaks = {}
    for count in (300, 3000):
        monkeypatch.setattr("tests.unet.volume.test_formats.IDS", np.zeros((count, 2, 2), np.uint64))
        (tmp_path / str(count)).mkdir()
        path = FORMATS[name](tmp_path / str(count), np.full((count, 80, 80), 9, np.uint8))
        done = subprocess.run([sys.executable, "-c", line, str(path)], capture_output=True, text=True, check=True)
        slices, kib = done.stdout.split()
        assert int(slices) == count
        peaks[count] = int(kib) / 1024
    # The longer stack alone is 18 MiB; HDF5 keeps up to 20 MiB about its chunks, however many there are.
    assert peaks[3000] < peaks[300] + (25 if name in ("cremi", "ilastik") else 8)


# A row of the table in docs/formats.md, by its first words, and its case here.
ROWS = {
    "TIFF: plain": "tiff",
    "OME-Zarr 0.4": "ngff_04",
    "OME-Zarr 0.5": "ngff_05_sharded",
    "Zarr arrays": "plain_zarr",
    "HDF5 of CREMI": "cremi",
    "HDF5 of ilastik": "ilastik",
    "N5": "n5",
    "MRC": "mrc",
    "a folder of": "pictures",
    "a pattern of": "pattern",
}


def test_the_table_in_the_docs_has_these_cases(project_root: Path) -> None:
    lines = (project_root / "docs" / "formats.md").read_text(encoding="utf-8").splitlines()
    start = lines.index("|---|---|---|---|---|") + 1
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : lines.index("", start)]]
    found = {}
    for name, read, _, labels, size in table:
        [case] = [case for words, case in ROWS.items() if name.startswith(words)]
        found[case] = read, labels, size
    assert set(found) == set(FORMATS)
    for case, (read, labels, size) in found.items():
        assert (read, labels) == ("yes", "yes")
        assert (size == "yes") == (case in SIZED), case
