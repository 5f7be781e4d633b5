"""Several stacks of one command: each is done, or said not to be, and the same command again does the rest."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet.processes import free_ports
from unet.progress import Progress

RNG = np.random.default_rng(21)
KINDS = [f"--output={kind}" for kind in ("probability", "mask", "overlay")]
CLIENT = [sys.executable, "serve/client.py"]


@pytest.fixture(scope="module")
def url(triton_server: TritonServer) -> str:
    return triton_server.settings.grpc_url


@pytest.fixture
def stacks(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.tif" for name in "abc"]
    for path in paths:
        tifffile.imwrite(path, RNG.integers(0, 256, (20, 120, 130), np.uint8), photometric="minisblack")
    return paths


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def line_for(stacks: list[Path], url: str, out: Path, *flags: str) -> list[str]:
    return [*CLIENT, *map(str, stacks), "--url", url, "--output_dir", str(out), *KINDS, *flags]


@pytest.mark.parametrize(("missing", "code"), [((), 0), ((Path("missing.tif"),), 2)])
def test_a_reader_that_goes_away_stops_no_stack(
    url: str, stacks: list[Path], tmp_path: Path, missing: tuple[Path, ...], code: int
) -> None:
    line = line_for([*missing, *stacks], url, tmp_path / "out", "--json")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(line, stdout=writing, stderr=subprocess.PIPE, check=False, text=True)
    os.close(writing)
    assert done.returncode == code, done.stderr
    assert {path.name for path in (tmp_path / "out").glob("*-probability.tif")} == {
        f"{path.stem}-probability.tif" for path in stacks
    }


def test_a_full_disk_behind_standard_output_stops_no_stack(url: str, stacks: list[Path], tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        line = line_for(stacks, url, tmp_path / "out", "--json")
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert done.returncode == 2
    assert "standard output cannot be written to" in done.stderr
    assert len(list((tmp_path / "out").glob("*-probability.tif"))) == len(stacks)


def test_a_killed_batch_is_finished_by_the_same_command(url: str, stacks: list[Path], tmp_path: Path) -> None:
    subprocess.run(line_for(stacks, url, tmp_path / "whole", "--quiet"), check=True)
    out = tmp_path / "out"
    line = line_for(stacks, url, out, "--resume", "--quiet")
    with subprocess.Popen(line) as process:
        journal = out / "b.partial" / "journal.jsonl"
        while not journal.exists() or journal.read_bytes().count(b'"page"') < 5:
            assert process.poll() is None
            os.sched_yield()
        process.kill()
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert contents(out) == contents(tmp_path / "whole")
    # And once more, when all is done, also without a server.
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main([*line_for(stacks, "localhost:1", out, "--resume")[2:]]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


KILLED_BETWEEN = """
import os, signal, sys
from serve.client import main
from serve.volume.outputs import Output
publish = Output.publish
def publish_and_die(self):
    publish(self)
    if self.kind == sys.argv[1]:
        os.kill(os.getpid(), signal.SIGKILL)
Output.publish = publish_and_die
main(sys.argv[2:])
"""


@pytest.mark.parametrize("kind", ["probability", "mask", "overlay"])
@pytest.mark.parametrize("former", [False, True])
def test_a_kill_between_two_outputs_names_is_continued(
    url: str, stacks: list[Path], tmp_path: Path, kind: str, former: bool
) -> None:
    subprocess.run(line_for(stacks[:1], url, tmp_path / "whole", "--quiet"), check=True)
    out, flags = tmp_path / "out", ["--quiet"]
    if former:  # results of another threshold, that this run replaces
        subprocess.run(line_for(stacks[:1], url, out, "--quiet", "--threshold", "0.3"), check=True)
        flags.append("--overwrite")
    words = line_for(stacks[:1], url, out, *flags)[2:]
    killed = subprocess.run([sys.executable, "-c", KILLED_BETWEEN, kind, *words], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert main([*words, "--resume"]) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_results_of_other_settings_do_not_count_as_done(
    url: str, stacks: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line_for(stacks, url, tmp_path / "out", "--quiet")[2:]
    assert main(words) == 0
    before = contents(tmp_path / "out")
    drawn = line_for(stacks, url, tmp_path / "out", "--quiet", "--resume", "--overlay_slice", "3")[2:]
    assert main(drawn) == 2
    assert "a-probability.tif exists already: add --overwrite" in capsys.readouterr().err
    assert main([*words, "--resume", "--threshold", "0.7"]) == 2
    assert "a-probability.tif exists already: add --overwrite" in capsys.readouterr().err
    # Another input of the same name, too.
    stacks[1].write_bytes(stacks[0].read_bytes())
    assert main([*words, "--resume"]) == 2
    said = capsys.readouterr().err
    assert "b-probability.tif exists already" in said
    assert "1 of 3 volumes failed" in said
    assert contents(tmp_path / "out") == before


def test_a_table_beside_cells_is_a_result_too(
    url: str, stacks: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(stacks[0]), "--url", url, "--output_dir", str(tmp_path / "out"), "--output", "labels3d"]
    table = tmp_path / "out" / "a-labels3d.csv"
    table.parent.mkdir()
    table.write_text("mine")
    assert main(words) == 2
    assert "a-labels3d.csv exists already: add --overwrite" in capsys.readouterr().err
    assert contents(table.parent) == {table.name: b"mine"}
    assert main([*words, "--overwrite"]) == 0
    assert ", threshold 0.5, " in capsys.readouterr().out
    assert table.read_text().startswith("id,voxels")
    # Cells whose table has gone are not done.
    made = contents(table.parent)
    table.unlink()
    assert main([*words, "--resume"]) == 2
    assert "a-labels3d.tif exists already" in capsys.readouterr().err
    assert main([*words, "--resume", "--overwrite"]) == 0
    assert contents(table.parent) == made


def test_a_stack_whose_results_exist_is_refused_and_the_others_are_done(
    url: str, stacks: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "b-mask.tif").write_text("mine")
    assert main(line_for(stacks, url, out, "--quiet")[2:]) == 2
    said = capsys.readouterr().err
    assert "b-mask.tif exists already: add --overwrite" in said
    assert "1 of 3 volumes failed" in said
    assert (out / "b-mask.tif").read_text() == "mine"
    assert {path.name for path in out.glob("*-probability.tif")} == {"a-probability.tif", "c-probability.tif"}


def test_too_little_room_is_said_before_any_work(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stack itself takes none: it is a hole in a file."""
    side = 16384
    pages = shutil.disk_usage(tmp_path).free // (6 * side**2) + 1
    source = tmp_path / "v.tif"
    tifffile.memmap(source, shape=(pages, side, side), dtype=np.uint8, bigtiff=True, photometric="minisblack")
    started = time.monotonic()
    assert main([str(source), "--url", url, "--output", "probability"]) == 2
    assert time.monotonic() - started < 10
    said = capsys.readouterr().err
    assert "GB free, and this takes" in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["v.tif"]


def test_servers_that_are_gone_end_the_list(
    tiny_artefacts: Path, settings_for: Callable[..., ServerSettings], url: str, stacks: list[Path], tmp_path: Path
) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    out = tmp_path / "out"
    with TritonServer(settings_for(tmp_path / "models", restarts=0)) as server:
        line = line_for(stacks, server.settings.grpc_url, out, "--resume", "--patience_s", "0.3")
        with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as process:
            while not (out / "a.partial" / "journal.jsonl").exists():
                assert process.poll() is None
                os.sched_yield()
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
            _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "1 of 3 volumes failed, for the reasons above; 2 were not begun; run the same command with --resume" in said
    assert main([*line_for(stacks, url, out, "--resume", "--quiet")[2:]]) == 0
    assert len(list(out.glob("*-probability.tif"))) == 3


def test_two_clients_do_not_write_one_output(url: str, stacks: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = line_for(stacks[:1], url, out, "--quiet")
    with subprocess.Popen(line) as first:
        while not (out / "a.partial" / "journal.jsonl").exists():
            assert first.poll() is None
            os.sched_yield()
        os.kill(first.pid, signal.SIGSTOP)
        try:
            second = subprocess.run([*line, "--resume"], stderr=subprocess.PIPE, check=False, text=True)
        finally:
            os.kill(first.pid, signal.SIGCONT)
    assert (first.returncode, second.returncode) == (0, 2)
    assert "another process is writing" in second.stderr
    assert tifffile.imread(out / "a-probability.tif").shape == (20, 120, 130)


@pytest.mark.parametrize("flag", ["--dry_run", "--dry-run"])
def test_a_dry_run_by_its_present_and_its_old_name(
    url: str, stacks: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    assert main([*line_for(stacks, url, tmp_path / "out", flag, "--json")[2:]]) == 0
    assert [json.loads(line)["slices"] for line in capsys.readouterr().out.splitlines()] == [20] * 3
    assert not (tmp_path / "out").exists()


def test_it_runs_without_a_home_and_a_folder_for_temporary_files(url: str, stacks: list[Path], tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment["TMPDIR"] = str(tmp_path / "none")
    line = line_for(stacks[:1], url, tmp_path / "out", "--quiet")
    done = subprocess.run(line, env=environment, check=True, capture_output=True, text=True)
    assert done.stderr == ""


@pytest.fixture
def killable(tiny_artefacts: Path, tmp_path: Path) -> Iterator[TritonServer]:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    http, grpc, metrics = free_ports(3)
    settings = ServerSettings(tmp_path / "models", tmp_path / "log", tmp_path / "state", http, grpc, metrics)
    with TritonServer(settings) as server:
        yield server


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_hundred_kills_of_client_and_server_change_no_byte(
    killable: TritonServer, stacks: list[Path], tmp_path: Path
) -> None:
    url, chance = killable.settings.grpc_url, random.Random(7)
    subprocess.run(line_for(stacks, url, tmp_path / "whole", "--quiet"), check=True)
    kills = rounds = 0
    while kills < 200:
        rounds += 1
        out = tmp_path / f"out{rounds}"
        line = line_for(stacks, url, out, "--resume", "--quiet", "--patience_s", "60")
        while True:
            with subprocess.Popen(line, stderr=subprocess.DEVNULL) as process:
                try:
                    process.wait(chance.uniform(0.5, 2.0))
                except subprocess.TimeoutExpired:
                    kills += 1
                    if chance.random() < 0.1:
                        assert killable.pid is not None
                        os.kill(killable.pid, signal.SIGKILL)
                        killable.stop()
                        killable.start()
                        process.wait()
                    else:
                        process.kill()
            if process.returncode == 0:
                break
        assert contents(out) == contents(tmp_path / "whole")
        shutil.rmtree(out)


@pytest.mark.parametrize("flags", [[], ["--log_format", "json"], ["--quiet"]])
def test_off_a_terminal_the_client_tells_how_far_it_is(
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
) -> None:
    source = tmp_path / "long.tif"
    tifffile.imwrite(source, RNG.integers(0, 60000, (60, 300, 300), np.uint16), photometric="minisblack")
    monkeypatch.setattr("serve.volume.request.Progress", functools.partial(Progress, every_s=0.0))
    assert main([str(source), "--url", url, "--output_dir", str(tmp_path / "out"), "--json", *flags]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["slices"] == 60
    lines = err.splitlines()
    if "json" in flags:
        said = [json.loads(line) for line in lines]
        assert {line["level"] for line in said} == {"info"}
        assert len({line["run"] for line in said}) == 1
        lines = [line["message"] for line in said]
    told = re.compile(r"(\d+) of 60 slices of long\.tif segmented(, about [\d.]+ (s|min|h) left)?")
    done = [int(found[1]) for line in lines if (found := told.fullmatch(line))]
    assert done == sorted(done)
    assert bool(done) == ("--quiet" not in flags)
    assert all(told.fullmatch(line) or line.startswith("looking through long.tif: ") for line in lines)
