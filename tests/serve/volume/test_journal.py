"""The journal of a run and the rows beside it, byte by byte and without a server."""

from __future__ import annotations

import errno
import os
import resource
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve import ClientError
from serve.volume.partial import JOURNAL, Partial, RawStore, checksum

HEADER = {"input": {"sha256": "a"}, "model": "1 b", "intensity_window": (0, 255)}
FIRST = '{"format": 2, "input": {"sha256": "a"}, "model": "1 b", "intensity_window": [0, 255]}\n'
ROWS = np.random.default_rng(3).random((3, 4, 5)).astype(np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "volume.partial"


def begun(folder: Path, **flags: bool) -> Partial:
    return Partial(folder, HEADER, **{"resume": False, "anew": False, **flags})


def store_in(folder: Path) -> RawStore:
    return RawStore(folder / "probability.raw", 4, 5, np.dtype(np.float16))


def interrupted(folder: Path, *pages: int) -> None:
    """What is left of a run that has found these slices."""
    partial, store = begun(folder), store_in(folder)
    for page in pages:
        partial.keep(store, page, 0, ROWS[page])
    store.close()
    partial.close(finished=False)


def test_the_journal_says_what_a_run_belongs_to_and_what_it_has_found(folder: Path) -> None:
    interrupted(folder, 1, 0)
    crcs = [zlib.crc32(ROWS[page].tobytes()) for page in (1, 0)]
    lines = [f'{{"page": {page}, "row": 0, "crc": {crc}}}\n' for page, crc in zip((1, 0), crcs)]
    assert (folder / JOURNAL).read_text() == "".join([FIRST, *lines])
    partial = begun(folder, resume=True)
    assert partial.done == {(1, 0): crcs[0], (0, 0): crcs[1]}
    assert not partial.may_replace
    partial.mark(2, 3, 7)
    assert partial.done[2, 3] == 7
    partial.close(finished=False)
    assert (folder / JOURNAL).read_text() == "".join([FIRST, *lines, '{"page": 2, "row": 3, "crc": 7}\n'])


def test_rows_lie_at_their_places_as_they_are_stored(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    store = RawStore(path, 4, 5, np.dtype(np.float16))
    wide = np.asarray(ROWS[1], np.float32)
    store.write(1, 2, wide[2:])
    # Columns that are not side by side in memory.
    store.write(0, 1, np.repeat(wide[:1], 2, axis=1)[:, ::2])
    stored = np.frombuffer(path.read_bytes(), np.float16).reshape(2, 4, 5)
    due = np.zeros((2, 4, 5), np.float16)
    due[1, 2:], due[0, 1] = ROWS[1, 2:], ROWS[1, 0]
    np.testing.assert_array_equal(stored, due)
    found = store.read(1, 1, 3)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, due[1, 1:3])
    # The file ends in the middle of a row.
    os.truncate(path, (4 + 3) * 5 * 2 + 7)
    np.testing.assert_array_equal(store.read(1, 1, 4), due[1, 1:3])
    assert store.read(7, 0, 4).shape == (0, 5)
    store.close()
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        store.read(0, 0, 1)
    # What is there stays.
    again = RawStore(path, 4, 5, np.dtype(np.float16))
    np.testing.assert_array_equal(again.read(0, 1, 2), due[0, 1:2])
    again.close()


def test_others_may_read_what_the_umask_leaves(folder: Path) -> None:
    former = os.umask(0o020)
    try:
        interrupted(folder, 0)
    finally:
        os.umask(former)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        JOURNAL: "0o646",
        "probability.raw": "0o646",
    }


def test_the_file_that_cannot_be_written_is_named(folder: Path) -> None:
    interrupted(folder, 0)
    partial, store = begun(folder, resume=True), store_in(folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal that comes with it.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        writes: dict[str, Callable[[], None]] = {
            "probability.raw": lambda: store.write(1, 0, ROWS[1]),
            JOURNAL: lambda: partial.mark(1, 0, 1),
        }
        for name, write in writes.items():
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
                write()
            assert caught.value.filename == str(folder / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    store.close()
    partial.close(finished=True)


def test_only_pixels_that_fit_their_checksum_are_recalled(folder: Path) -> None:
    interrupted(folder, 0, 1)
    partial, store = begun(folder, resume=True), store_in(folder)
    recalled = partial.recall(store, 0, 0, 4)
    assert recalled is not None
    np.testing.assert_array_equal(recalled, ROWS[0])
    partial.keep(store, 2, 1, ROWS[2, 1:])
    recalled = partial.recall(store, 2, 1, 4)
    assert recalled is not None
    np.testing.assert_array_equal(recalled, ROWS[2, 1:])
    del partial.done[2, 1]
    # Not found before, and found with another height.
    assert partial.recall(store, 2, 0, 4) is None
    assert partial.recall(store, 0, 0, 3) is None
    assert (0, 0) not in partial.done
    store.write(1, 3, ROWS[2, 3:])
    assert partial.recall(store, 1, 0, 4) is None
    assert partial.done == {}
    # A checksum of fewer rows than were asked for, of a file that ends there.
    store.write(2, 0, ROWS[2, :2])
    partial.mark(2, 0, checksum(ROWS[2, :2]))
    os.truncate(folder / "probability.raw", (8 + 2) * 5 * 2)
    assert partial.recall(store, 2, 0, 4) is None
    store.close()
    partial.close(finished=False)


def test_a_finished_run_and_one_that_found_nothing_leave_nothing(folder: Path) -> None:
    interrupted(folder)
    assert not folder.exists()
    interrupted(folder, 0)
    assert folder.exists()
    begun(folder, resume=True).close(finished=True)
    assert list(folder.parent.iterdir()) == []


def test_one_process_writes_at_a_time(folder: Path) -> None:
    partial = begun(folder)
    said = f"another process is writing {folder}: wait for it, or choose another --output_dir"
    for flags in ({"resume": True}, {"anew": True}):
        with pytest.raises(ClientError) as caught:
            begun(folder, **flags)
        assert str(caught.value) == said
    partial.mark(0, 0, 1)
    # Neither one that is refused nor one that has ended keeps the folder, whoever still holds the object.
    partial.close(finished=False)
    with pytest.raises(ClientError, match="add --resume"):
        begun(folder)
    after = begun(folder, resume=True)
    assert after.done == {(0, 0): 1}
    after.close(finished=True)


def test_what_is_there_is_neither_lost_nor_continued_unasked(folder: Path) -> None:
    interrupted(folder, 0)
    (folder / "more").mkdir()
    (folder / "more" / "file").write_bytes(b"x")
    with pytest.raises(ClientError) as caught:
        begun(folder)
    assert str(caught.value) == (
        f"{folder} holds what an interrupted run has found: add --resume to go on with it, or --overwrite to begin anew"
    )
    assert (folder / "more" / "file").exists()
    anew = begun(folder, anew=True)
    assert anew.done == {}
    assert {path.name: path.read_text() for path in folder.iterdir()} == {JOURNAL: FIRST}
    anew.close(finished=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "2 c"}, "another model (1 b, now 2 c)"),
        ({"intensity_window": [0, 4095]}, "another intensity window ([0, 255], now [0, 4095])"),
        ({"input": {"sha256": "a" * 40}}, 'another input ({"sha256": "a"}, now {"sha256": "...)'),
        ({"model": "x" * 24}, f"another model (1 b, now {'x' * 24})"),
        ({"model": "x" * 25}, f"another model (1 b, now {'x' * 12}...)"),
        ({"tile_size": 572}, "another tile size (null, now 572)"),
        ({"format": 3}, "another format (2, now 3)"),
        ({"tta": True, "model": "2 c"}, "another model (1 b, now 2 c)"),
    ],
)
def test_what_belongs_to_something_else_is_not_continued(folder: Path, changed: dict[str, Any], said: str) -> None:
    interrupted(folder, 0)
    before = (folder / JOURNAL).read_bytes()
    with pytest.raises(ClientError) as caught:
        Partial(folder, {**HEADER, **changed}, resume=True, anew=False)
    assert str(caught.value) == f"{folder} belongs to {said}: add --overwrite to begin anew"
    assert (folder / JOURNAL).read_bytes() == before
    begun(folder, resume=True).close(finished=True)


def test_a_torn_last_line_is_cut_off(folder: Path) -> None:
    interrupted(folder, 0)
    journal = folder / JOURNAL
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"page": 1, "row": 0, "crc": 1}')
    partial = begun(folder, resume=True)
    assert partial.done.keys() == {(0, 0)}
    partial.mark(2, 0, 9)
    partial.close(finished=False)
    assert journal.read_bytes() == whole + b'{"page": 2, "row": 0, "crc": 9}\n'


@pytest.mark.parametrize("resume", [False, True])
def test_a_journal_without_a_whole_line_is_begun_anew(folder: Path, resume: bool) -> None:
    folder.mkdir(parents=True)
    (folder / JOURNAL).write_bytes(FIRST.encode()[:-1])
    (folder / "probability.raw").write_bytes(b"x")
    partial = begun(folder, resume=resume)
    assert (partial.done, (folder / JOURNAL).read_text()) == ({}, FIRST)
    assert not (folder / "probability.raw").exists()
    partial.close(finished=False)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"page": 0, "row": 0}', "'crc'"),
        ('{"row": 0, "crc": 0}', "'page'"),
        ('{"page": 0, "crc": 0}', "'row'"),
        ('{"page": Infinity, "row": 0, "crc": 0}', "cannot convert float infinity"),
        ('{"page": [], "row": 0, "crc": 0}', "int\\(\\) argument"),
        ("[1]", "cannot convert"),
        ("not JSON", "Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_a_damaged_journal_is_named(folder: Path, line: str, reason: str) -> None:
    folder.mkdir(parents=True)
    (folder / JOURNAL).write_text(f"{FIRST}{line}\n")
    with pytest.raises(ClientError, match=rf"{JOURNAL} is damaged \({reason}.*\): add --overwrite to begin anew$"):
        begun(folder, resume=True)
    begun(folder, anew=True).close(finished=True)


def test_whoever_goes_on_may_replace_what_the_run_might(folder: Path) -> None:
    partial = begun(folder)
    assert partial.may_replace is False
    for _ in range(2):
        partial.allow_replacing()
        assert partial.may_replace is True
    partial.mark(1, 2, 3)
    partial.close(finished=False)
    marks = '{"may_replace": true}\n{"page": 1, "row": 2, "crc": 3}\n'
    assert (folder / JOURNAL).read_text() == FIRST + marks
    partial = begun(folder, resume=True)
    assert (partial.may_replace, partial.done) == (True, {(1, 2): 3})
    partial.allow_replacing()
    partial.close(finished=False)
    assert (folder / JOURNAL).read_text() == FIRST + marks
