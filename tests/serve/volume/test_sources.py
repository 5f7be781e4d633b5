"""Volumes of every format through a served model, and which files a command line means."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

from serve.client import main
from serve.volume.sources import expanded
from unet.volume import open_volume
from unet.volume.scaled import ScaledRows, ScaledVolume

if TYPE_CHECKING:
    from serve.server.process import TritonServer

RNG = np.random.default_rng(3)
STACK = RNG.integers(0, 256, (3, 150, 90), np.uint8)


@pytest.fixture(scope="module")
def url(triton_server: TritonServer) -> str:
    return triton_server.settings.grpc_url


def probability(folder: Path, source: Path | str, url: str, name: str, *flags: str) -> np.ndarray[Any, Any]:
    assert (
        main([str(source), "--url", url, "--quiet", "--output_dir", str(folder), "--output", "probability", *flags])
        == 0
    )
    found = folder / name
    if found.suffix == ".zarr":
        return np.asarray(zarr.open_group(str(found), mode="r")["0"][...])
    return np.asarray(tifffile.imread(found))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_format_gives_the_bytes_that_tiff_gives(url: str, tmp_path: Path, dtype: Any) -> None:
    pixels = STACK.astype(dtype) * (1 if dtype == np.uint8 else 200)
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="minisblack")
    expected = probability(tmp_path / "out", tmp_path / "a.tif", url, "a-probability.tif")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("volumes/raw", data=pixels, chunks=(2, 32, 32), compression="gzip")
        file["volumes/labels/neuron_ids"] = np.zeros(pixels.shape, np.uint64)
    group = zarr.open_group(str(tmp_path / "c.zarr"), mode="w", zarr_format=3)
    group.create_array("0", data=pixels, chunks=(2, 32, 32), shards=(4, 160, 96))
    axes = [{"name": name, "type": "space"} for name in "zyx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [{"path": "0"}]}]}
    (tmp_path / "d").mkdir()
    for index, page in enumerate(pixels):
        Image.fromarray(page).save(tmp_path / "d" / f"z{index + 8}.png")
    for source, name in (
        ("b.h5", "b-probability.tif"),
        ("b.h5:/volumes/raw", "b-raw-probability.tif"),
        ("c.zarr", "c-probability.zarr"),
        ("d", "d-probability.tif"),
        ("d/*.png", "d-probability.tif"),
    ):
        found = probability(tmp_path / "out", tmp_path / source, url, name, "--overwrite")
        assert found.tobytes() == expected.tobytes(), source


def test_each_slice_and_each_channel_by_its_own_window(url: str, tmp_path: Path) -> None:
    """A slice that is brighter and of less contrast gives the same as the first."""
    drifting = np.stack([STACK[0].astype(np.uint16) * 100, STACK[0].astype(np.uint16) * 10 + 30000])
    tifffile.imwrite(tmp_path / "a.tif", drifting, photometric="minisblack", imagej=True, metadata={"axes": "CYX"})
    for flags in (["--window", "slice"], []):  # without it each channel has its own
        found = probability(tmp_path, tmp_path / "a.tif", url, "a-probability.tif", "--overwrite", *flags)
        assert np.abs(found[0] - found[1]).max() < 0.02
    found = probability(tmp_path, tmp_path / "a.tif", url, "a-probability.tif", "--overwrite", "--window", "0", "65535")
    assert np.abs(found[0] - found[1]).max() > 0.1


def test_one_bad_file_does_not_stop_the_others(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.tif", "c.tif"):
        tifffile.imwrite(tmp_path / name, STACK, photometric="minisblack")
    (tmp_path / "b.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:5000])
    assert main([*(str(tmp_path / f"{name}.tif") for name in "abc"), "--url", url, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"error: {tmp_path / 'b.tif'} is truncated or damaged" in said
    assert "1 of 3 volumes failed" in said
    assert {path.name for path in tmp_path.glob("*-probability.tif")} == {"a-probability.tif", "c-probability.tif"}


def test_a_pattern_typed_twice_does_not_take_its_own_results(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.tif", "b.tif"):
        tifffile.imwrite(tmp_path / name, STACK, photometric="minisblack")
    for name in ("._a.tif", "a.tif.aux.xml", "notes.txt"):
        (tmp_path / name).write_bytes(b"\0\5\26\7")
    (tmp_path / "c.partial").mkdir()
    pattern = str(tmp_path / "*")
    assert main([pattern, "--url", url, "--quiet"]) == 0
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*")}
    assert {path.name for path in written} == {
        *("a-probability.tif", "a-overlay.png", "b-probability.tif", "b-overlay.png"),
    }
    capsys.readouterr()
    assert main([pattern, "--url", url]) == 2
    assert "a-probability.tif exists already" in capsys.readouterr().err
    # A batch that is finished is done at once, with no server.
    assert main([pattern, "--url", "localhost:1", "--resume"]) == 0
    assert "a.tif is done already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*")} == written


def test_a_pattern_of_stacks_is_several_and_one_of_slices_is_one(tmp_path: Path) -> None:
    (tmp_path / "slices").mkdir()
    for index in range(3):
        tifffile.imwrite(tmp_path / f"s{index}.tif", STACK, photometric="minisblack")
        tifffile.imwrite(tmp_path / "slices" / f"z{index}.tif", STACK[index], photometric="minisblack")
    assert expanded([str(tmp_path / "s*.tif")]) == [tmp_path / f"s{index}.tif" for index in range(3)]
    assert expanded([str(tmp_path / "slices" / "*.tif")]) == [tmp_path / "slices" / "*.tif"]
    # Names that the shell has put in place of the pattern are stacks of their own.
    names = [str(tmp_path / "slices" / f"z{index}.tif") for index in range(3)]
    assert expanded(names) == [Path(name) for name in names]


def test_a_volume_inside_a_zarr_folder_is_written_beside_it(url: str, tmp_path: Path) -> None:
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2)
    group.create_array("0", data=STACK, chunks=(1, 150, 90))
    before = {path for path in (tmp_path / "a.zarr").rglob("*")}
    assert main([str(tmp_path / "a.zarr" / "0"), "--url", url, "--quiet"]) == 0
    assert {path for path in (tmp_path / "a.zarr").rglob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"a.zarr", "a-0-probability.zarr", "a-0-overlay.png"}


@pytest.mark.parametrize(("size", "said"), [(4.0, False), (3.5, False), (8.0, True), (None, False)])
def test_another_pixel_size_than_the_networks_is_said(
    url: str, tmp_path: Path, size: float | None, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {} if size is None else {"PhysicalSizeX": size, "PhysicalSizeY": size}
    units = {} if size is None else {"PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, STACK, photometric="minisblack", ome=True, metadata={"axes": "ZYX", **sizes, **units})
    assert main([str(path), "--url", url, "--quiet"]) == 0
    sentence = f"warning: {path} has pixels of 8 nm and the network was trained on 4 nm"
    assert (sentence in capsys.readouterr().err) == said


def sized(path: Path, pixels: np.ndarray[Any, Any], size_nm: float) -> Path:
    metadata = {"axes": "ZYX", "PhysicalSizeX": size_nm, "PhysicalSizeY": size_nm}
    units = {"PhysicalSizeXUnit": "nm", "PhysicalSizeYUnit": "nm"}
    tifffile.imwrite(path, pixels, photometric="minisblack", ome=True, metadata={**metadata, **units})
    return path


@pytest.mark.parametrize("size_nm", [8.0, 2.0])
def test_slices_are_scaled_to_the_network_and_the_results_back(url: str, tmp_path: Path, size_nm: float) -> None:
    """What is found equals scaling by hand before and after."""
    source = sized(tmp_path / "a.tif", STACK, size_nm)
    height, width = round(150 * size_nm / 4), round(90 * size_nm / 4)
    with open_volume(source) as volume:
        pixels = np.stack(list(ScaledVolume(volume, height, width)))
    byhand = probability(tmp_path, sized(tmp_path / "b.tif", pixels, 4.0), url, "b-probability.tif")
    found = probability(tmp_path, source, url, "a-probability.tif", "--resample")
    assert found.shape == STACK.shape
    for page in range(len(STACK)):
        back = ScaledRows(Rows(byhand), (height, width), (150, 90)).read(page, 0, 150)
        np.testing.assert_allclose(found[page], back, atol=1e-6)
    everything = [f"--output={kind}" for kind in ("probability", "mask", "labels", "overlay")]
    assert main([str(source), "--url", url, "--quiet", "--resample", "--overwrite", *everything]) == 0
    mask = tifffile.imread(tmp_path / "a-mask.tif")
    assert np.array_equal(mask, np.where(found > 0.5, np.uint8(255), np.uint8(0)))
    assert np.array_equal(tifffile.imread(tmp_path / "a-labels.tif") > 0, mask > 0)
    assert tifffile.imread(tmp_path / "a-overlay.tif").shape == (*STACK.shape, 3)


class Rows:
    """A stack in memory."""

    def __init__(self, stack: np.ndarray[Any, Any]) -> None:
        self.stack = stack

    def read(self, page: int, row0: int, row1: int) -> np.ndarray[Any, Any]:
        return self.stack[page, row0:row1]


def test_without_a_pixel_size_nothing_is_scaled(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tifffile.imwrite(tmp_path / "a.tif", STACK, photometric="minisblack")
    assert main([str(tmp_path / "a.tif"), "--url", url, "--quiet", "--resample"]) == 2
    assert "--resample needs the pixel size of" in capsys.readouterr().err


def test_a_volume_on_a_web_server_is_written_here(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    group = zarr.open_group(str(tmp_path / "there" / "v.zarr"), mode="w", zarr_format=2)
    group.create_array("0", data=STACK, chunks=(1, 64, 64))
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": [{"name": axis} for axis in "zyx"], "datasets": [{"path": "0"}]}
    ]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path / "there"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            assert main([f"http://127.0.0.1:{server.server_port}/v.zarr", "--url", url, "--quiet"]) == 0
        finally:
            server.shutdown()
    assert {path.name for path in Path.cwd().iterdir()} == {"v-probability.zarr", "v-overlay.png"}
    found = zarr.open_group("v-probability.zarr", mode="r")["0"][...]
    np.testing.assert_array_equal(found, (STACK.astype(np.float16) * np.float16(1 / 255)).astype(np.float32))
