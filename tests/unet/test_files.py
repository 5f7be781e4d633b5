from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unet.files import atomic_directory, atomic_file, sha256_of, write_json


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
        assert aside.parent == path.parent
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


def test_what_a_living_process_fills_is_not_taken_for_abandoned(tmp_path: Path) -> None:
    (tmp_path / ".d.12345678").mkdir()
    with atomic_directory(tmp_path / "d") as first, atomic_directory(tmp_path / "d") as second:
        assert not (tmp_path / ".d.12345678").exists()
        (first / "first").touch()
        (second / "second").touch()
    assert [item.name for item in (tmp_path / "d").iterdir()] == ["first"]
