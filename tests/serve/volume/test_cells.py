"""Cells in 3-D equal what labelling the whole volume at once gives, by slices and in bounded memory."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import scipy.ndimage
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from serve.client import main
from serve.segment.errors import ClientError
from serve.server.process import TritonServer
from serve.volume.cells import Cells, find_cells, pages_above
from serve.volume.number_cells import main as cells_main
from serve.volume.request import Request
from unet.volume import StackMetadata

Masks = npt.NDArray[np.bool_]
QUIET = Request(quiet=True)


def cells_of(volume: Masks, share: float = 0.0, least: int = 1, above: list[int | None] | None = None) -> Cells:
    return find_cells(lambda page: volume[page], above or [None, *range(len(volume) - 1)], share, least, QUIET.progress)


def numbered(volume: Masks, cells: Cells) -> npt.NDArray[np.int64]:
    return np.stack([cells.ids(page, plane) for page, plane in enumerate(volume)])


volumes = arrays(np.bool_, st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9)))


@settings(max_examples=60, deadline=None)
@given(volume=volumes)
def test_without_a_least_overlap_they_are_the_components_of_the_volume(volume: Masks) -> None:
    cells = cells_of(volume)
    expected, count = scipy.ndimage.label(volume)
    found = numbered(volume, cells)
    np.testing.assert_array_equal(found, expected)
    assert len(cells.voxels) == count
    for index, box in enumerate(scipy.ndimage.find_objects(expected)):
        places = np.argwhere(expected == index + 1)
        assert cells.voxels[index] == len(places)
        assert cells.box[index].tolist() == [side.start for side in box] + [side.stop for side in box]
        np.testing.assert_allclose(cells.centroid[index], places.mean(axis=0))


def helix(slices: int = 24, size: int = 21) -> Masks:
    """Two tubes that wind around each other through all slices, and meet in the last but one."""
    volume = np.zeros((slices, size, size), bool)
    for page in range(slices):
        for start in (0.0, np.pi):
            angle = start + page * 0.35
            row, column = (round(size / 2 + 7 * turn) for turn in (np.sin(angle), np.cos(angle)))
            volume[page, row - 2 : row + 3, column - 2 : column + 3] = True
    volume[slices - 2] = True
    return volume


def serpentine(size: int = 15) -> Masks:
    """One path of one voxel that fills every other slice to and fro, and climbs at its ends."""
    volume = np.zeros((size, size, size), bool)
    for page in range(0, size, 2):
        volume[page, ::2] = True
        for row in range(1, size, 2):
            volume[page, row, -1 if row % 4 == 1 else 0] = True
        if page + 1 < size:
            volume[page + 1, *((0, 0) if page % 4 else (-1, -1))] = True
    return volume


@pytest.mark.parametrize("volume", [helix(), helix()[::-1], serpentine()])
def test_windings_are_one_cell_however_late_they_meet(volume: Masks) -> None:
    expected, count = scipy.ndimage.label(volume)
    assert count == 1
    np.testing.assert_array_equal(numbered(volume, cells_of(volume)), expected)


@settings(max_examples=50, deadline=None)
@given(volume=volumes, share=st.sampled_from([0.25, 0.5, 1.0]), least=st.integers(1, 4))
def test_segments_are_linked_by_their_share_and_small_cells_are_left_out(
    volume: Masks, share: float, least: int
) -> None:
    planes = [scipy.ndimage.label(plane)[0] for plane in volume]
    cell: dict[tuple[int, int], set[tuple[int, int]]] = {
        (page, number): {(page, number)} for page, plane in enumerate(planes) for number in np.unique(plane) if number
    }
    for page in range(1, len(planes)):
        for upper in range(1, planes[page - 1].max() + 1):
            for lower in range(1, planes[page].max() + 1):
                one, other = planes[page - 1] == upper, planes[page] == lower
                common = int((one & other).sum())
                if common and common >= share * (one | other).sum():
                    together = cell[page - 1, upper] | cell[page, lower]
                    for member in together:
                        cell[member] = together
    expected, numbers = np.zeros(volume.shape, np.int64), dict[int, int]()
    for (page, number), members in cell.items():
        if sum(int((planes[p] == n).sum()) for p, n in members) >= least:
            expected[page][planes[page] == number] = numbers.setdefault(id(members), len(numbers) + 1)
    np.testing.assert_array_equal(numbered(volume, cells_of(volume, share, least)), expected)


def test_time_points_and_channels_are_never_linked() -> None:
    metadata = StackMetadata(axes="TZC", lengths=(2, 3, 2))
    above = pages_above(metadata, 12)
    assert above == [None, None, 0, 1, 2, 3, None, None, 6, 7, 8, 9]
    assert pages_above(StackMetadata(), 3) == [None, 0, 1]
    assert cells_of(np.ones((12, 2, 2), bool), above=above).voxels.tolist() == [12] * 4
    with pytest.raises(ClientError, match="the slices count through T, C"):
        pages_above(StackMetadata(axes="TC", lengths=(2, 3)), 6)


def phantom(shape: tuple[int, int, int] = (5, 60, 80)) -> npt.NDArray[np.uint8]:
    noise = np.random.default_rng(2).normal(size=shape)
    smooth = scipy.ndimage.gaussian_filter(noise, (1.2, 3, 3))
    return np.where(smooth > np.quantile(smooth, 0.7), 220, 20).astype(np.uint8)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_client_writes_cells_and_their_table(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = phantom()
    source = tmp_path / "v.tif"
    tifffile.imwrite(
        source, images, imagej=True, resolution=(0.25, 0.25), metadata={"axes": "ZYX", "spacing": 50, "unit": "nm"}
    )
    words = [str(source), "--url", triton_server.settings.grpc_url, "--quiet", "--threshold", "0.4"]
    assert main([*words, "--output", "labels3d", "--output", "probability", "--min_voxels", "30"]) == 0
    whole, count = scipy.ndimage.label(images > 100)
    sizes = np.bincount(whole.ravel())[1:]
    kept = np.flatnonzero(sizes >= 30) + 1
    assert 1 < len(kept) < count
    expected = np.concatenate([[0], np.where(sizes >= 30, np.cumsum(sizes >= 30), 0)])[whole]
    with tifffile.TiffFile(tmp_path / "v-labels3d.tif") as tiff:
        assert tiff.asarray().dtype == np.uint32
        np.testing.assert_array_equal(tiff.asarray(), expected)
        assert tiff.pages.first.software.endswith("; link 0, at least 30 voxels")
    table = rows_of(tmp_path / "v-labels3d.csv")
    assert [int(row["voxels"]) for row in table] == sizes[kept - 1].tolist()
    assert float(table[0]["volume_um3"]) == pytest.approx(sizes[kept[0] - 1] * 4 * 4 * 50e-9, rel=1e-5)
    # Of the probability that is there already the same comes without a server; by its own threshold, or another.
    for more in ([], ["--threshold", "0.4"]):
        again = [str(tmp_path / "v-probability.tif"), "--output_dir", str(tmp_path / "again"), "--min_voxels", "30"]
        assert cells_main([*again, "--quiet", "--overwrite", *more]) == 0
        assert f"v-labels3d.csv: {len(kept)} cells, threshold 0.4" in capsys.readouterr().out
        np.testing.assert_array_equal(tifffile.imread(tmp_path / "again" / "v-labels3d.tif"), expected)
        assert rows_of(tmp_path / "again" / "v-labels3d.csv") == table
    assert cells_main(again) == 2
    assert "v-labels3d.tif exists already: add --overwrite" in capsys.readouterr().err
    (tmp_path / "again" / "v-labels3d.tif").unlink()
    assert cells_main(again) == 2
    assert "v-labels3d.csv exists already: add --overwrite" in capsys.readouterr().err
    # What is done is left as it is, and what was made otherwise is not done.
    done = [*words[:3], "--threshold", "0.4", "--output", "labels3d", "--output", "probability", "--resume"]
    assert main([*done, "--min_voxels", "30"]) == 0
    assert "is done already" in capsys.readouterr().err
    assert main([*done, "--min_voxels", "31"]) == 2


def test_an_ome_zarr_volume_has_cells_of_64_bits_with_smaller_levels(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = phantom((4, 300, 600))
    group = zarr.open_group(str(tmp_path / "v.zarr"), mode="w")
    group.create_array("0", shape=images.shape, chunks=(1, 100, 100), dtype="u1")[:] = images
    scale = [{"type": "scale", "scale": [50.0, 4.0, 4.0]}]
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    group.attrs["ome"] = {
        "version": "0.5",
        "multiscales": [{"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}],
    }
    words = [str(tmp_path / "v.zarr"), "--url", triton_server.settings.grpc_url, "--quiet"]
    assert main([*words, "--output", "labels3d"]) == 0
    found = zarr.open_group(str(tmp_path / "v-labels3d.zarr"), mode="r")
    expected, count = scipy.ndimage.label(images > 127)
    assert found["0"].dtype == np.uint64
    np.testing.assert_array_equal(found["0"][:], expected)
    np.testing.assert_array_equal(found["1"][:], expected[:, ::2, ::2])
    # So viewers draw ids and not intensities.
    assert found.attrs["ome"]["image-label"] == {"source": {"image": "../v.zarr"}}
    assert len(rows_of(tmp_path / "v-labels3d.csv")) == count
    assert main([*words, "--output", "labels3d", "--shard", "0/2", "--output_dir", str(tmp_path / "o")]) == 2
    assert "serve.volume.number_cells NAME-probability.zarr" in capsys.readouterr().err


MEMORY = """
import json, sys
import numpy as np
from serve.volume.cells import find_cells
from serve.volume.request import Request
rng = np.random.default_rng(0)
tile = np.kron(rng.random((64, 64)) > 0.3, np.ones((16, 16), bool))
def plane(page):
    return np.roll(tile, page, axis=1)
def peak():
    # Not ru_maxrss, which begins with that of the process that started this one.
    return int(next(row for row in open("/proc/self/status") if row.startswith("VmHWM")).split()[1]) / 1024
slices = int(sys.argv[1])
before = peak()
cells = find_cells(plane, [None, *range(slices - 1)], 0.0, 1, Request(quiet=True).progress)
for page in range(slices):
    cells.ids(page, plane(page))
print(json.dumps({"cells": len(cells.voxels), "peak_mib": peak(), "grown_mib": peak() - before}))
"""


@pytest.mark.slow
def test_512_slices_of_1024_are_linked_in_under_a_gibibyte() -> None:
    done = subprocess.run([sys.executable, "-c", MEMORY, "512"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["peak_mib"] < 1024
