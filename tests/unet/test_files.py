from __future__ import annotations

import json
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
