"""An input that changes while it is read never gives an output of two stacks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr

from serve import ClientError, Request, Segmenter, segment_volume
from serve.client import main
from serve.server.process import TritonServer
from unet.volume import StackReader, open_volume

RNG = np.random.default_rng(5)
SHAPE = (12, 60, 70)


def tiff(path: Path, images: np.ndarray[Any, Any]) -> Path:
    tifffile.imwrite(path, images, photometric="minisblack")
    return path


def ome_zarr(path: Path, images: np.ndarray[Any, Any]) -> Path:
    group = zarr.open_group(str(path), mode="w", zarr_format=2)
    group.create_array("0", data=images, chunks=(1, 64, 64), chunk_key_encoding={"name": "v2", "separator": "/"})
    group.attrs["multiscales"] = [
        {"version": "0.4", "axes": [{"name": name} for name in "zyx"], "datasets": [{"path": "0"}]}
    ]
    return path


def replace(source: Path, other: Path) -> None:
    """Give another stack the source's name, as a copy script does that writes aside and renames."""
    if source.is_dir():
        shutil.rmtree(source)
    os.replace(other, source)


def rewrite(source: Path, other: Path) -> None:
    """Write another stack's pixels into the source in place."""
    if source.is_dir():
        for chunk in other.rglob("[0-9]*/*/*"):
            if chunk.is_file():
                (source / chunk.relative_to(other)).write_bytes(chunk.read_bytes())
    else:
        with source.open("r+b") as stream:
            stream.write(other.read_bytes())


class Meddling(Segmenter):
    """Does something to the input once some slices are read."""

    def __init__(self, url: str, meddle: Callable[[], None]) -> None:
        super().__init__(url, in_flight=1)
        self._meddle = meddle

    def segment_bands(self, jobs: Any, window: Any = None) -> Any:
        for index, (job, rows) in enumerate(super().segment_bands(jobs, window)):
            if index == 3:
                self._meddle()
            yield job, rows


@pytest.mark.parametrize("make", [tiff, ome_zarr])
@pytest.mark.parametrize("change", [replace, rewrite])
def test_an_input_that_changes_while_it_is_read_gives_no_output(
    triton_server: TritonServer, tmp_path: Path, make: Callable[..., Path], change: Callable[..., None]
) -> None:
    first, second = (RNG.integers(0, 256, SHAPE, np.uint8) for _ in range(2))
    name = "v.tif" if make is tiff else "v.zarr"
    (tmp_path / "other").mkdir()
    source, other = make(tmp_path / name, first), make(tmp_path / "other" / name, second)
    url = triton_server.settings.grpc_url
    segmenter = Meddling(url, lambda: change(source, other))
    with segmenter, pytest.raises(ClientError, match="was changed or replaced while it was read"):
        segment_volume(segmenter, source, Request(quiet=True))
    assert not list(tmp_path.glob("v-*"))
    assert main([str(source), "--url", url, "--quiet", "--overwrite"]) == 0
    with open_volume(source) as volume:
        pixels = np.stack([volume.rows(page, 0, SHAPE[1]) for page in range(SHAPE[0])])
    np.testing.assert_array_equal(pixels, second)


def test_a_reader_keeps_to_the_file_that_it_opened(tmp_path: Path) -> None:
    first, second = (RNG.integers(0, 256, SHAPE, np.uint8) for _ in range(2))
    source, other = tiff(tmp_path / "v.tif", first), tiff(tmp_path / "w.tif", second)
    with StackReader(source) as reader:
        before = reader.fingerprint()
        assert not reader.changed()
        replace(source, other)
        assert reader.changed()
        np.testing.assert_array_equal([reader.rows(page, 0, SHAPE[1]) for page in range(len(reader))], first)
        assert reader.fingerprint() == before


def test_an_input_that_is_moved_away_is_read_to_its_end(triton_server: TritonServer, tmp_path: Path) -> None:
    source = tiff(tmp_path / "v.tif", RNG.integers(0, 256, SHAPE, np.uint8))
    url = triton_server.settings.grpc_url
    with Meddling(url, lambda: os.replace(source, tmp_path / "archive.tif")) as segmenter:
        segment_volume(segmenter, source, Request(quiet=True))
    assert tifffile.imread(tmp_path / "v-probability.tif").shape == SHAPE
