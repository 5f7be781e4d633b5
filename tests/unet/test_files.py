from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from unet.files import (
    _exchange,
    atomic_directory,
    atomic_file,
    fsync,
    remove_abandoned,
    remove_directory,
    sha256_of,
    write_json,
)


class Interrupted(Exception):  # noqa: N818
    pass


def interrupted_file(path: Path) -> None:
    with atomic_file(path) as aside:
        aside.write_text("half")
        raise Interrupted


def interrupted_directory(path: Path) -> None:
    with atomic_directory(path) as aside:
        (aside / "half").touch()
        raise Interrupted


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with pytest.raises(Interrupted):
        interrupted_file(path)
    assert list(path.parent.iterdir()) == []
    with atomic_file(path) as aside:
        assert not path.exists()
        assert aside.stat().st_dev == path.parent.stat().st_dev
        aside.write_text("whole")
    assert path.read_text() == "whole"
    with pytest.raises(Interrupted):
        interrupted_file(path)
    assert path.read_text() == "whole"
    assert [item.name for item in path.parent.iterdir()] == ["a.txt"]


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with pytest.raises(Interrupted):
        interrupted_directory(path)
    assert list(tmp_path.iterdir()) == []
    for content in ("first", "second"):
        with atomic_directory(path) as aside:
            (aside / content).touch()
        assert [item.name for item in path.iterdir()] == [content]
    with pytest.raises(Interrupted):
        interrupted_directory(path)
    assert [item.name for item in path.iterdir()] == ["second"]
    assert [item.name for item in tmp_path.iterdir()] == ["d"]


def test_json_comes_back(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"steps": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"steps": [1, 2]}


def test_the_hash_of_a_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_the_hash_of_a_directory_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "a").write_bytes(b"1")
    seen = {sha256_of(tmp_path / "d")}
    (tmp_path / "d" / "e" / "a").write_bytes(b"2")
    seen.add(sha256_of(tmp_path / "d"))
    (tmp_path / "d" / "e" / "a").rename(tmp_path / "d" / "a")
    seen.add(sha256_of(tmp_path / "d"))
    assert len(seen) == 3


@pytest.fixture(params=[0o077, 0o022, 0o002], ids="{:03o}".format)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    former = os.umask(request.param)
    yield request.param
    os.umask(former)


def modes(folder: Path) -> dict[str, str]:
    return {path.name: f"{path.stat().st_mode & 0o777:03o}" for path in [folder, *folder.rglob("*")]}


def test_modes_are_what_the_umask_leaves(umask: int, tmp_path: Path) -> None:
    """Whatever the library that writes makes of it, and whatever modes copied files had."""
    source = tmp_path / "source"
    source.mkdir(mode=0o700)
    (source / "private").touch(0o600)
    (source / "public").touch()
    (source / "public").chmod(0o644)
    with atomic_directory(tmp_path / "d") as aside:
        shutil.copytree(source, aside / "copied")
        (aside / "made").mkdir(0o755)
        (aside / "program").touch()
        (aside / "program").chmod(0o700)
        (aside / "link").symlink_to(source / "private")
    folder, file = f"{0o777 & ~umask:03o}", f"{0o666 & ~umask:03o}"
    assert modes(tmp_path / "d") == {
        "d": folder, "copied": folder, "made": folder, "private": file, "public": file, "program": folder, "link": "600"
    }  # fmt: skip
    assert (source / "private").stat().st_mode & 0o777 == 0o600
    with atomic_file(tmp_path / "deep" / "f") as aside:
        aside.unlink()
        os.close(os.open(aside, os.O_CREAT | os.O_WRONLY, 0o600))
    with atomic_file(tmp_path / "deep" / "script") as aside:
        aside.chmod(0o755)
    assert modes(tmp_path / "deep") == {"deep": folder, "f": file, "script": folder}


# Writes aside, says so, and waits to be killed.
HALF = """
import sys, time
from unet.files import _exchange, atomic_directory, atomic_file
with {"file": atomic_file, "directory": atomic_directory}[sys.argv[1]](sys.argv[2]) as aside:
    ((aside / "state") if aside.is_dir() else aside).write_text("half")
    print("half", flush=True)
    time.sleep(600)
"""


def start_half(kind: str, path: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-c", HALF, kind, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    return process


def write_another(folder: Path) -> None:
    """By a process of its own, as the next run is."""
    code = "import sys; from unet.files import write_json; write_json(sys.argv[1], 1)"
    subprocess.run([sys.executable, "-c", code, str(folder / "latest.json")], check=True)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_next_run_removes_what_killed_ones_left(kind: str, tmp_path: Path) -> None:
    started = [start_half(kind, tmp_path / f"step-{step}") for step in range(3)]
    assert len(list(tmp_path.iterdir())) == 3  # nobody takes a living one's for a leftover
    for process in started:
        with process:
            process.kill()
    assert len(list(tmp_path.iterdir())) == 3
    with start_half(kind, tmp_path / "living") as living:  # its start alone removes the three
        write_another(tmp_path)
        left = sorted(path.name for path in tmp_path.iterdir())
        living.kill()
    assert left[0].startswith(".living.")
    assert left[1:] == ["latest.json"]


def test_what_is_not_ours_is_not_swept(tmp_path: Path) -> None:
    for name in (".git", ".thesis.aside", ".step-1.old.aside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (tmp_path / ".note.aside").touch()
    remove_abandoned(tmp_path)
    assert len(list(tmp_path.rglob("*"))) == 7


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import unet.files as files

final, moment, exchange = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "exchange"
if not exchange:
    files._exchange = lambda one, other: False

def die_at(name, module):
    real, seen = getattr(module, name), []

    def wrapped(*arguments, **named):
        done = real(*arguments, **named)
        seen.append(1)
        if f"{name} {len(seen)}" == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    setattr(module, name, wrapped)

die_at("replace", os)
die_at("_exchange", files)
with files.atomic_directory(final) as aside:
    (aside / "new").touch()
    if moment == "fill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(
    ("moment", "way", "left"),
    [
        ("fill", "exchange", ["old"]),
        ("_exchange 1", "exchange", ["new"]),
        ("replace 1", "in turn", ["old"]),
        ("replace 2", "in turn", ["new"]),
    ],
)
def test_a_kill_at_any_moment_leaves_one_of_both(tmp_path: Path, moment: str, way: str, left: list[str]) -> None:
    path = tmp_path / "d"
    with atomic_directory(path) as aside:
        (aside / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment, way], check=False)
    assert done.returncode == -signal.SIGKILL
    # The next writer repairs what the kill left, even if it fails itself.
    with pytest.raises(Interrupted):
        interrupted_directory(path)
    assert [item.name for item in path.iterdir()] == left
    assert [item.name for item in tmp_path.iterdir()] == ["d"]


def test_a_share_that_cannot_sync_or_change_modes_stops_nothing(tmp_path: Path) -> None:
    """The kernel's own files, and a pipe, know no fsync either."""
    fsync(Path("/proc/self/status"))
    read, write = os.pipe()
    fsync(write)
    os.close(read)
    os.close(write)
    with pytest.raises(FileNotFoundError):
        fsync(tmp_path / "missing")


# A layered file system, as a container's: what lies in its lower layer cannot be renamed.
LAYERED = """
set -e
mkdir lower upper merged; mkdir lower/artefacts; touch lower/artefacts/former
mount -t tmpfs none upper 2>/dev/null || exit 77
mkdir upper/changes upper/work
mount -t overlay overlay -o lowerdir=lower,upperdir=upper/changes,workdir=upper/work merged 2>/dev/null || exit 77
"$0" -c "
from unet.files import atomic_directory
with atomic_directory('merged/artefacts') as aside:
    (aside / 'new').touch()
"
ls -A merged merged/artefacts
"""


def test_a_directory_of_a_lower_layer_is_replaced(tmp_path: Path) -> None:
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("mounting needs root and unshare")
    done = subprocess.run(
        [unshare, "--mount", "bash", "-c", LAYERED, sys.executable],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode in (1, 77) and "artefacts" not in done.stderr:
        pytest.skip("this system does not let us mount")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["merged:", "artefacts", "merged/artefacts:", "new"]


def test_a_directory_is_removed_or_stays(tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    remove_directory(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        remove_directory(tmp_path / "d")
    assert list(tmp_path.iterdir()) == []


def test_two_names_are_exchanged_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / folder.name).touch()
    assert _exchange(one, other)
    assert (one / "other").exists()
    assert (other / "one").exists()
    with pytest.raises(FileNotFoundError) as caught:
        _exchange(one, tmp_path / "none")
    assert caught.value.filename == str(tmp_path / "none")
    # Where the system has no such call, the caller takes another way.
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not _exchange(one, other)
    assert (one / "other").exists()


def test_names_of_two_file_systems_are_not_exchanged(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        if Path(elsewhere).stat().st_dev == tmp_path.stat().st_dev:
            pytest.skip("/dev/shm is of the file system of the tests")
        (tmp_path / "here").mkdir()
        assert not _exchange(tmp_path / "here", Path(elsewhere))


def test_json_is_written_as_people_read_it(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"name": "\u00b5", "steps": [1]})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "name": "\\u00b5",\n  "steps": [\n    1\n  ]\n}\n'
