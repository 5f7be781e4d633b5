"""What the client writes, in every form, and what it reads."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.ndimage
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from serve import Segmenter
from serve.client import main
from serve.segment import bands as bands_module
from serve.segment.bands import bands_of, turned, turned_back
from serve.server.process import TritonServer
from serve.volume.outputs import Output, OutputSettings, target_of, to_float32
from serve.volume.partial import RawStore
from unet.geometry import plan_tiles
from unet.intensity import Windows
from unet.scores import agglomerate
from unet.volume import StackReader
from unet.volume.overlay import membrane_overlay

RNG = np.random.default_rng(2)
ALL = [f"--output={kind}" for kind in ("probability", "mask", "labels", "overlay")]


@pytest.fixture(scope="module")
def url(triton_server: TritonServer) -> str:
    return triton_server.settings.grpc_url


def expected(image: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    """What the test's network answers."""
    return (image.astype(np.float16) * np.float16(1 / 255)).astype(np.float32)


FLAVOURS: dict[str, dict[str, Any]] = {
    "imagej": {"imagej": True, "resolution": (0.25, 0.25), "metadata": {"axes": "ZYX", "spacing": 50.0, "unit": "nm"}},
    "ome": {"ome": True, "metadata": {"axes": "ZYX", "PhysicalSizeX": 4.0, "PhysicalSizeXUnit": "nm"}},
    "plain": {"metadata": None, "resolution": (300, 300), "resolutionunit": 2},
    "big": {"bigtiff": True, "metadata": None, "resolution": (300, 300), "resolutionunit": 2},
}


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_output_keeps_size_and_scale(url: str, tmp_path: Path, flavour: str) -> None:
    images = RNG.integers(0, 256, (3, 60, 80), np.uint8)
    suffix = ".ome.tif" if flavour == "ome" else ".tif"
    source = tmp_path / f"v{suffix}"
    tifffile.imwrite(source, images, photometric="minisblack", **FLAVOURS[flavour])
    assert main([str(source), "--url", url, "--quiet", "--threshold", "0.4", *ALL]) == 0
    probability = expected(images)
    mask = probability > np.float32(0.4)
    wanted = {
        "probability": probability,
        "mask": np.where(mask, 255, 0).astype(np.uint8),
        "labels": np.stack([scipy.ndimage.label(plane)[0] for plane in mask]).astype(np.uint16),
        "overlay": np.stack([membrane_overlay(a, b, 0.4) for a, b in zip(images, probability)]),
    }
    with tifffile.TiffFile(source) as tiff:
        first = tiff.pages.first
        scale = [first.tags[name].value for name in ("XResolution", "YResolution", "ResolutionUnit")]
    for kind, pixels in wanted.items():
        with tifffile.TiffFile(tmp_path / f"v-{kind}{suffix}") as tiff:
            found = tiff.asarray()
            assert found.dtype == pixels.dtype
            np.testing.assert_array_equal(found, pixels)
            page = tiff.pages.first
            assert len(tiff.pages) == 3
            if flavour == "imagej":
                assert tiff.imagej_metadata is not None
                assert (tiff.imagej_metadata["spacing"], tiff.imagej_metadata["unit"]) == (50.0, "nm")
            if flavour == "ome":
                assert 'PhysicalSizeX="4.0"' in str(tiff.ome_metadata)
                assert tiff.series[0].axes == ("ZYXS" if kind == "overlay" else "ZYX")
            else:
                assert [page.tags[name].value for name in ("XResolution", "YResolution", "ResolutionUnit")] == scale
            assert "intensity window as they are; threshold 0.4; views 1" in page.software


def test_cells_that_a_gap_joins_are_told_apart(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.full((2, 300, 41), 250, np.uint8)
    images[:, :, 20] = 5
    images[:, 10:13, 20] = 153  # 0.6
    images[1] = images[1].T.reshape(41, 300).T[::-1]
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack")
    words = [str(source), "--url", url, "--output", "labels", "--threshold", "0.5", "--agglomerate", "0.2"]
    assert main(words) == 0
    found = tifffile.imread(tmp_path / "v-labels.tif")
    for page, plane in zip(found, expected(images)):
        assert scipy.ndimage.label(plane > 0.5)[1] == 1
        cells, count = agglomerate(plane, 0.5, 0.2)
        assert count == 2
        np.testing.assert_array_equal(page, cells)
    with tifffile.TiffFile(tmp_path / "v-labels.tif") as tiff:
        assert tiff.pages.first.software.endswith("; agglomerated below 0.2")
    # It is the same by bands, is done when it is done, and not when another limit is asked for.
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    assert "is done already" in capsys.readouterr().err
    assert main([*words[:-1], "0.3", "--resume"]) == 2
    assert "v-labels.tif exists already" in capsys.readouterr().err
    monkeypatch.setattr(bands_module.bands_of, "__defaults__", (4_000,))
    assert main([*words, "--output_dir", str(tmp_path / "bands")]) == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "bands" / "v-labels.tif"), found)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--output", "labels", "--agglomerate", "1.5"], "--agglomerate is 1.5; it must be from 0 to 1, and 0.2 suits"),
        (["--output", "mask", "--agglomerate", "0.2"], "--agglomerate is for --output labels"),
        (
            ["--output", "labels", "--agglomerate", "0.2", "--threshold", "0.8"],
            "--agglomerate 0.2 changes nothing at the threshold 0.8: give a --threshold below 0.8, such as 0.5",
        ),
    ],
)
def test_a_limit_that_cannot_be_meant_is_refused(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str
) -> None:
    tifffile.imwrite(tmp_path / "v.tif", np.zeros((1, 60, 60), np.uint8), photometric="minisblack")
    assert main([str(tmp_path / "v.tif"), "--url", url, *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["v.tif"]


def test_the_window_is_said_and_recorded(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = RNG.integers(1000, 3000, (2, 70, 70)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "w.tif", images, photometric="minisblack")
    assert main([str(tmp_path / "w.tif"), "--url", url, "--json"]) == 0
    low, high = json.loads(capsys.readouterr().out)["window"]
    with tifffile.TiffFile(tmp_path / "w-probability.tif") as tiff:
        assert f"intensity window {low:g} to {high:g}" in tiff.pages.first.software


def test_a_dry_run_does_nothing(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, np.zeros((2, 100, 60), np.uint8), photometric="minisblack")
    assert main([str(source), "--url", url, "--dry-run"]) == 0
    assert "2 slices of 100 x 60 uint8, 2 tiles of 252 each" in capsys.readouterr().out
    assert main([str(source), "--url", url, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tiles_per_slice"] == 2
    assert list(tmp_path.iterdir()) == [source]


def test_more_segments_than_the_labels_can_number_are_not_lost(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = (np.indices((1, 380, 380)).sum(axis=0) % 2 * 255).astype(np.uint8)
    tifffile.imwrite(tmp_path / "b.tif", board, photometric="minisblack")
    line = [str(tmp_path / "b.tif"), "--url", url, "--output", "labels", "--quiet"]
    assert main(line) == 2
    assert "has 72200 segments, more than uint16 can number: add --label_dtype uint32" in capsys.readouterr().err
    assert main([*line, "--label_dtype", "uint32", "--resume"]) == 0
    labels = tifffile.imread(tmp_path / "b-labels.tif")
    assert (labels.dtype, labels.max()) == (np.uint32, 72200)


def test_eight_views_are_averaged(url: str) -> None:
    """Exactly, whatever the order of the answers: the test's network sees each pixel alone."""
    image = RNG.integers(0, 256, (100, 130), np.uint8)
    with Segmenter(url, tta=True, in_flight=4, batch_size=3) as segmenter:
        np.testing.assert_array_equal(segmenter.segment_slice(image), expected(image))


@given(st.integers(0, 7), st.integers(0, 7))
def test_the_views_are_eight_and_can_be_undone(one: int, other: int) -> None:
    square = np.arange(9).reshape(3, 3)
    np.testing.assert_array_equal(turned_back(turned(square, one), one), square)
    assert (one == other) == np.array_equal(turned(square, one), turned(square, other))


@given(st.integers(1, 900), st.integers(1, 300), st.sampled_from([1, 20_000, 10**9]))
def test_bands_are_the_whole_plan(height: int, width: int, pixels: int) -> None:
    plan = plan_tiles(height, width, 252)
    bands = bands_of(plan, pixels)
    assert [tile for band in bands for tile in band.tiles] == list(plan.tiles)
    assert [band.row0 for band in bands] == [0, *(band.row1 for band in bands[:-1])]
    assert bands[-1].row1 == height
    assert all(0 <= band.read0 <= band.row0 < band.row1 <= band.read1 <= height for band in bands)


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_slice_in_bands_is_the_slice_in_one_piece(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str | None
) -> None:
    images = scipy.ndimage.gaussian_filter(RNG.random((2, 400, 150)), (0, 4, 4))
    images = ((images - images.min()) / np.ptp(images) * 4000).astype(np.uint16)
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack", compression=compression, byteorder=">")
    whole, banded = tmp_path / "whole", tmp_path / "banded"
    assert main([str(source), "--url", url, "--quiet", "--output_dir", str(whole), *ALL]) == 0
    monkeypatch.setattr(bands_module.bands_of, "__defaults__", (20_000,))
    assert main([str(source), "--url", url, "--quiet", "--output_dir", str(banded), *ALL]) == 0
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in banded.iterdir()
    }
    assert tifffile.imread(whole / "v-labels.tif").max() > 3


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.floats(0.3, 0.7))
def test_labels_by_bands_are_the_labels_of_the_whole(seed: int, rows: int, share: float) -> None:
    import tempfile

    mask = np.random.default_rng(seed).random((rows * 64 + 10, 70)) < share
    height, width = mask.shape
    bands = bands_of(plan_tiles(height, width, 252), 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tifffile.imwrite(folder / "v.tif", mask.astype(np.uint8), photometric="minisblack")
        store = RawStore(folder / "store", height, width, np.dtype(np.float16))
        store.write(0, 0, mask.astype(np.float16))
        with StackReader(folder / "v.tif") as volume:
            chosen = OutputSettings(("labels",), 0.5, "uint16", Windows((None,)), "test")
            output = Output("labels", folder / "v-labels.tif", folder, volume, bands, chosen)
            output.finish_page(0, store)
        output.close()
        store.close()
        output.publish()
        np.testing.assert_array_equal(tifffile.imread(folder / "v-labels.tif"), scipy.ndimage.label(mask)[0])


def ome_zarr(path: Path, images: np.ndarray, axes: str = "zyx") -> Path:  # type: ignore[type-arg]
    """An OME-Zarr 0.4 image as its writers lay it out."""
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    group.create_array(
        "0",
        data=images,
        chunks=(*(1,) * (images.ndim - 2), 64, 64),
        chunk_key_encoding={"name": "v2", "separator": "/"},
    )
    spatial = {"type": "space", "unit": "nanometer"}
    group.attrs["multiscales"] = [
        {
            "version": "0.4",
            "axes": [{"name": name, **(spatial if name in "zyx" else {"type": "channel"})} for name in axes],
            "datasets": [
                {
                    "path": "0",
                    "coordinateTransformations": [{"type": "scale", "scale": [50.0, 4.0, 4.0][-images.ndim :]}],
                }
            ],
        }
    ]
    return path


def test_an_ome_zarr_volume_becomes_others(url: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (3, 150, 90), np.uint8)
    source = ome_zarr(tmp_path / "v.ome.zarr", images)
    assert main([str(source), "--url", url, "--quiet", *ALL]) == 0
    group = zarr.open_group(str(tmp_path / "v-probability.zarr"), mode="r")
    np.testing.assert_array_equal(group["0"][...], expected(images))
    [multiscale] = group.attrs["ome"]["multiscales"]
    assert multiscale["datasets"][0]["coordinateTransformations"][0]["scale"] == [50.0, 4.0, 4.0]
    assert [axis["name"] for axis in multiscale["axes"]] == ["z", "y", "x"]
    assert "views 1" in group.attrs["unet"]["made_by"]
    labels = zarr.open_group(str(tmp_path / "v-labels.zarr"), mode="r")["0"]
    assert (labels.dtype, labels.shape) == (np.uint16, images.shape)
    with tifffile.TiffFile(tmp_path / "v-overlay.tif") as tiff:
        assert tiff.asarray().shape == (*images.shape, 3)
        assert 'PhysicalSizeX="4.0"' in str(tiff.ome_metadata)
    assert main([str(source), "--url", url, "--quiet", "--overwrite", *ALL]) == 0
    assert not list(tmp_path.glob("*.partial"))


def test_an_output_is_whole_on_the_disk_before_it_has_its_name(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a power cut: what is under the final name has reached the disk, and then the name has."""
    synced: set[Path] = set()
    unsynced: dict[str, set[Path]] = {}
    fsync, replace = os.fsync, os.replace

    def noting_fsync(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    def noting_replace(old: Path, new: Path) -> None:
        if new.parent == tmp_path:
            unsynced[new.name] = {old, *old.rglob("*")} - synced
            synced.discard(tmp_path)
        replace(old, new)

    source = ome_zarr(tmp_path / "v.ome.zarr", RNG.integers(0, 256, (3, 150, 90), np.uint8))
    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    assert main([str(source), "--url", url, "--quiet", "--output=labels3d", *ALL]) == 0
    names = ["probability.zarr", "mask.zarr", "labels.zarr", "overlay.tif", "overlay.png"]
    names += ["labels3d.zarr", "labels3d.csv"]
    assert unsynced == {f"v-{name}": set() for name in names}
    assert tmp_path in synced


def test_the_written_volume_can_be_read_as_one(url: str, tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (2, 3, 40, 50), np.uint8)
    source = ome_zarr(tmp_path / "v.zarr", images, "czyx")
    assert main([str(source), "--url", url, "--quiet", "--output", "mask"]) == 0
    assert main([str(tmp_path / "v-mask.zarr"), "--url", url, "--quiet", "--output", "probability"]) == 0
    found = zarr.open_group(str(tmp_path / "v-mask-probability.zarr"), mode="r")["0"][...]
    np.testing.assert_array_equal(found, (images > 127).astype(np.float32))


def test_a_folder_that_is_no_image_is_one_sentence(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    zarr.open_group(str(tmp_path / "v.zarr"), mode="w")
    assert main([str(tmp_path / "v.zarr"), "--url", url]) == 2
    assert "has neither an OME-Zarr image nor an array" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("a.tif", "a-mask.tif"),
        ("a.b.TIFF", "a.b-mask.tif"),
        ("a.ome.tiff", "a-mask.ome.tif"),
        ("a.ome.zarr", "a-mask.zarr"),
    ],
)
def test_names(name: str, target: str) -> None:
    assert target_of(Path("x") / name, "mask", None) == Path("x") / target


def test_a_full_disk_is_a_sentence_and_nothing_is_lost(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on file sizes stands in for the disk's end."""
    images = RNG.integers(0, 256, (8, 100, 100), np.uint8)
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, images, photometric="minisblack")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        assert main([str(source), "--url", url, "--shared_memory", "off", "--quiet"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err
    assert said == f"error: cannot use {tmp_path}/v.partial/probability.tif: File too large\n"
    assert not (tmp_path / "v-probability.tif").exists()
    assert main([str(source), "--url", url, "--resume", "--quiet"]) == 0
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "v-probability.tif"), expected(images))


def test_every_half_number_becomes_itself() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).reshape(256, 256)
    for view in (halves, halves.T, halves[::3, 1::2]):
        np.testing.assert_array_equal(to_float32(view).view(np.uint32), view.astype(np.float32).view(np.uint32))
    singles = halves.astype(np.float32)
    assert to_float32(singles) is singles
