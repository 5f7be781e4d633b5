"""A volume by shards: the bytes of one process, whoever computes them, in whichever order, however often killed."""

from __future__ import annotations

import hashlib
import itertools
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from serve.client import main
from serve.segment.bands import bands_of
from serve.segment.errors import ClientError
from serve.segment.segmenter import Segmenter
from serve.server.process import TritonServer
from serve.volume.request import Request, Share
from serve.volume.shards.plan import shards_of
from serve.volume.shards.work import ShardWork
from unet.geometry import plan_tiles
from unet.volume import open_volume

RNG = np.random.default_rng(7)
KINDS = ("probability", "mask", "labels")


def make_volume(path: Path, shape: tuple[int, ...] = (9, 120, 90), chunks: tuple[int, ...] = (4, 64, 64)) -> Path:
    group = zarr.open_group(str(path), mode="w", zarr_format=3)
    group.create_array("0", data=RNG.integers(0, 256, shape).astype(np.uint8), chunks=chunks)
    axes = [{"name": name, "type": "space", "unit": "nanometer"} for name in "zyx"]
    transforms = [{"type": "scale", "scale": [50.0, 4.0, 4.0]}]
    datasets = [{"path": "0", "coordinateTransformations": transforms}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    return path


def contents(path: Path) -> dict[str, str]:
    """The hash of each file: a difference of two prints few words."""
    return {
        item.relative_to(path).as_posix(): hashlib.sha256(item.read_bytes()).hexdigest()[:8]
        for item in path.rglob("*")
        if item.is_file()
    }


def flags(kinds: tuple[str, ...] = KINDS) -> list[str]:
    return ["--quiet", *(word for kind in kinds for word in ("--output", kind))]


@given(
    st.integers(1, 30), st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([204, 252, 572]),
    st.floats(1, 3e7), st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_band_is_in_one_shard_that_has_whole_chunks(
    pages: int, height: int, width: int, tile: int, pixels: float, divisible: bool
) -> None:
    bands = bands_of(plan_tiles(height, width, tile), pixels=2**16)
    shards = shards_of(pages, width, bands, pixels, divisible=divisible)
    units = [(page, band.row0) for shard in shards for page, band in shard.units()]
    assert units == [(page, band.row0) for page in range(pages) for band in bands]
    assert [shard.number for shard in shards] == list(range(len(shards)))
    chunk = bands[0].row1
    for shard in shards:
        assert shard.bands[0].row0 % chunk == 0
        assert shard.bands[-1].row1 % chunk == 0 or shard.bands[-1].row1 == height
        assert shard.whole == (len(shard.bands) == len(bands))
        assert shard.whole or divisible
    assert len(shards) % pages == 0 or shards[0].whole


@given(st.integers(0, 1000), st.integers(1, 50))
def test_shares_are_the_whole_and_nearly_equal(total: int, count: int) -> None:
    shares = [Share(index, count).of(total) for index in range(count)]
    assert list(itertools.chain(*shares)) == list(range(total))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["3/3", "4/3", "1", "a/b", "-1/3", "1/0", "1/3/5", ""])
def test_a_share_that_is_none_is_one_sentence(text: str) -> None:
    with pytest.raises(ClientError, match=r"is not K/N with K from 0 to N-1: .*\$SLURM_ARRAY_TASK_ID"):
        Share.parse(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_volume(tmp_path_factory.mktemp("volume") / "v.zarr")


@pytest.fixture(scope="module")
def alone(source: Path, triton_server: TritonServer) -> dict[str, str]:
    """What one process writes without shards."""
    out = source.parent / "alone"
    assert main([str(source), *flags(), "--url", triton_server.settings.grpc_url, "--output_dir", str(out)]) == 0
    return contents(out)


@given(
    order=st.permutations(range(9)), mpx=st.sampled_from([0.001, 0.025, 0.05]), workers=st.sampled_from([1, 2, 7]),
    batch=st.integers(1, 8), in_flight=st.integers(1, 5),
)  # fmt: skip
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_bytes_depend_on_no_order_no_batch_and_no_number_of_workers(
    triton_server: TritonServer, source: Path, alone: dict[str, str], order: list[int], mpx: float, workers: int,
    batch: int, in_flight: int,
) -> None:  # fmt: skip
    out = source.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    request = Request(kinds=KINDS, folder=out, picture_slice=None, share=Share(), shard_mpx=mpx, quiet=True)
    url = triton_server.settings.grpc_url
    with Segmenter(url, batch_size=batch, in_flight=in_flight) as segmenter:
        for worker in range(workers):
            with open_volume(source) as volume:
                work = ShardWork(volume, segmenter, request)
                count = min(workers, len(work.shards))
                work.compute(work.missing([n for n in order if n < len(work.shards) and n % count == worker]))
                if work.finish():
                    assert worker == count - 1
                    break
    assert contents(out) == alone


def test_tasks_without_a_coordinator_and_a_second_pass(
    triton_server: TritonServer, source: Path, alone: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [str(source), *flags(), "--url", triton_server.settings.grpc_url, "--output_dir", str(tmp_path)]
    line.extend(("--shard_mpx", "0.02"))
    words = [word for word in line if word != "--quiet"]
    assert main([*words, "--shard", "2/3"]) == 0
    assert "3 shards of this share done, 0 of them before; 6 of other shares are missing" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"v.shards"}
    assert main([*words, "--shard", "2/3"]) == 0
    assert "3 of them before" in capsys.readouterr().out
    assert main([*line, "--shard", "0/3"]) == 0
    # The second of three never came: whoever does the rest publishes.
    assert main([*line, "--shard", "0/1"]) == 0
    assert contents(tmp_path) == alone
    # One that comes late finds nothing to do, and writes nothing.
    assert main([*words, "--shard", "1/3"]) == 0
    assert "is done already" in capsys.readouterr().err
    assert contents(tmp_path) == alone


def test_a_large_slice_is_several_shards(triton_server: TritonServer, tmp_path: Path) -> None:
    """Its smaller levels are written by whoever finds all of them done."""
    source = make_volume(tmp_path / "v.zarr", (1, 2300, 2100), (1, 512, 512))
    line = [str(source), "--url", triton_server.settings.grpc_url, "--quiet"]
    assert main([*line, "--output_dir", str(tmp_path / "alone")]) == 0
    for index in random.Random(1).sample(range(3), 3):
        words = ["--shard_mpx", "2", "--shard", f"{index}/3", "--output_dir", str(tmp_path / "out")]
        assert main([*line, *words]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")
    assert any("/1/c/" in name for name in contents(tmp_path / "out"))


def test_kills_change_nothing(triton_server: TritonServer, source: Path, alone: dict[str, str], tmp_path: Path) -> None:
    line = [sys.executable, "serve/client.py", str(source), *flags(), "--url", triton_server.settings.grpc_url]
    line += ["--output_dir", str(tmp_path), "--shard_mpx", "0.001", "--in_flight", "1"]
    done = tmp_path / "v.shards" / "done"
    for kill in range(3):
        with subprocess.Popen([*line, "--shard", "0/1"]) as process:
            while process.poll() is None and not (done.exists() and len(list(done.iterdir())) > 2 * kill):
                time.sleep(0.002)
            process.kill()
    assert subprocess.run([*line, "--shard", "0/1"], check=False).returncode == 0
    assert contents(tmp_path) == alone


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--shard", "0/2", "--output", "overlay"], "--shard writes no overlay"),
        (["--shard", "0/2", "--overwrite"], "--shard throws nothing away"),
        (["--shard", "0/2", "--dask", "tcp://127.0.0.1:1"], "leave one of them out"),
        (["--dask", "tls://127.0.0.1:1"], "name its authority"),
        (["--shard", "0/2", "--shard_mpx", "0"], "--shard_mpx is 0; it must be positive"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    triton_server: TritonServer, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str],
    sentence: str,
) -> None:  # fmt: skip
    line = [str(source), "--url", triton_server.settings.grpc_url, "--output_dir", str(tmp_path)]
    assert main([*line, *words]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_tiff_is_refused_with_what_to_do(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tifffile

    tifffile.imwrite(tmp_path / "v.tif", np.zeros((2, 40, 40), np.uint8), photometric="minisblack")
    assert main([str(tmp_path / "v.tif"), "--url", triton_server.settings.grpc_url, "--shard", "0/2"]) == 2
    assert "are single TIFF files: convert it to NAME.zarr" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["v.tif"]


def test_all_shards_tell_cells_apart_alike(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_volume(tmp_path / "v.zarr")
    line = [str(source), "--quiet", "--url", triton_server.settings.grpc_url, "--output", "labels"]
    shared = [*line, "--shard_mpx", "0.02"]
    assert main([*shared, "--shard", "0/2", "--agglomerate", "0.2"]) == 0
    for other in (["--agglomerate", "0.3"], []):
        assert main([*shared, "--shard", "1/2", *other]) == 2
        assert "v.shards belongs to another" in capsys.readouterr().err
    assert main([*shared, "--shard", "1/2", "--agglomerate", "0.2"]) == 0
    assert main([*line, "--agglomerate", "0.2", "--output_dir", str(tmp_path / "alone")]) == 0
    found, due = (zarr.open_group(str(folder / "v-labels.zarr"), mode="r") for folder in (tmp_path, tmp_path / "alone"))
    np.testing.assert_array_equal(found["0"][:], due["0"][:])
    assert main([*line, "--output_dir", str(tmp_path / "plain")]) == 0
    plain = zarr.open_group(str(tmp_path / "plain" / "v-labels.zarr"), mode="r")
    assert (plain["0"][:] != found["0"][:]).any()


def test_other_settings_another_input_and_a_change_are_refused(
    triton_server: TritonServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_volume(tmp_path / "v.zarr")
    line = [str(source), "--quiet", "--url", triton_server.settings.grpc_url, "--shard_mpx", "0.02"]
    assert main([*line, "--output", "mask", "--shard", "0/2"]) == 0
    assert main([*line, "--output", "mask", "--shard", "1/2", "--threshold", "0.7"]) == 2
    assert "v.shards belongs to another settings" in capsys.readouterr().err
    assert main([*line, "--output", "labels", "--shard", "1/2"]) == 2
    assert "v.shards belongs to another" in capsys.readouterr().err
    # In one process it goes on where it was.
    assert main([*line, "--output", "mask"]) == 2
    assert "add --resume to go on with it" in capsys.readouterr().err
    zarr.open_group(str(source), mode="r+")["0"][0, :4, :4] = 1
    assert main([*line, "--output", "mask", "--shard", "1/2"]) == 2
    assert "v.shards belongs to another input" in capsys.readouterr().err
    assert main([*line, "--output", "mask", "--overwrite"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"v.zarr", "v-mask.zarr"}
