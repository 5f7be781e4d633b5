"""What a run has found so far, kept beside its output so that nothing is computed twice after a crash.

``NAME.partial`` holds the probabilities of the finished bands and a journal. The journal's first line says which input,
model and settings they belong to; each further line names a finished band with the CRC-32 of its pixels. Lines are
written after the pixels. Whatever a crash tore, a line or pixels that were not on the disk yet, does not fit its
checksum and is computed again.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.errors import ClientError
from unet.files import naming, parse_json, take_lock
from unet.volume.tiff.canvas import append_all, write_all

if TYPE_CHECKING:
    from collections.abc import Mapping

JOURNAL = "journal.jsonl"
FORMAT = 2
_MAY_REPLACE = "may_replace"
Key = tuple[int, int]


class RawStore:
    """Probabilities in one plain file, sparse where nothing was written yet."""

    def __init__(self, path: Path, height: int, width: int, dtype: np.dtype[Any]) -> None:
        self._path, self._height, self._width, self._dtype = path, height, width, dtype
        self._row_bytes = width * dtype.itemsize
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def write(self, page: int, row0: int, rows: npt.NDArray[Any]) -> None:
        """Write rows from ``row0`` on of slice ``page``."""
        offset = (page * self._height + row0) * self._row_bytes
        with naming(self._path):
            write_all(self._descriptor, np.ascontiguousarray(rows, self._dtype), offset)

    def read(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page``; fewer where the file ends earlier."""
        offset = (page * self._height + row0) * self._row_bytes
        raw = os.pread(self._descriptor, (row1 - row0) * self._row_bytes, offset)
        whole = len(raw) // self._row_bytes * self._row_bytes
        return np.frombuffer(raw[:whole], self._dtype).reshape(-1, self._width)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class Partial:
    """The folder of one run's results so far; no two processes may have it open at a time.

    Attributes:
        folder: ``NAME.partial``.
        done: the finished bands, (slice, first row), with the CRC-32 of their pixels.
        may_replace: whether what has the outputs' names may be replaced: it was asked for, or may be this run's own.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any], *, resume: bool, anew: bool) -> None:
        """Begin, or go on.

        Args:
            folder: where.
            header: what the results belong to, for JSON.
            resume: whether to go on with what a former run left, if it left anything.
            anew: whether to throw that away.

        Raises:
            ClientError: if there is something and neither was asked for, it belongs to something else, or another
                process is at work on it.
        """
        self.folder, self.done = folder, dict[Key, int]()
        self.may_replace = False
        self._header = {"format": FORMAT, **json.loads(json.dumps(header))}
        journal = folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(folder, os.O_RDONLY)
        try:
            self._take_lock()
            if journal.exists() and not anew:
                self._load(journal, resume)
            else:
                self._clear()
            self._journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except BaseException:
            os.close(self._lock)
            raise
        if os.fstat(self._journal).st_size == 0:
            self._append(self._header)

    def _take_lock(self) -> None:
        # Without locks, on Windows or some shares, the user sees to it that one process writes.
        if take_lock(self._lock) is False:
            raise ClientError(f"another process is writing {self.folder}: wait for it, or choose another --output_dir")

    def _clear(self) -> None:
        for item in self.folder.iterdir():
            if item.is_dir():
                shutil.rmtree(item)
            else:
                item.unlink()

    def _load(self, journal: Path, resume: bool) -> None:
        raw = journal.read_bytes()
        # What follows the last line's end was torn.
        whole = raw[: raw.rfind(b"\n") + 1]
        if not whole:
            self._clear()
            return
        try:
            lines = [dict(parse_json(line)) for line in whole.splitlines()]
            former = lines[0]
            self.may_replace = any(_MAY_REPLACE in line for line in lines[1:])
            self.done = {
                (int(line["page"]), int(line["row"])): int(line["crc"])
                for line in lines[1:]
                if _MAY_REPLACE not in line
            }
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise ClientError(f"{journal} is damaged ({error}): add --overwrite to begin anew") from error
        if not resume:
            raise ClientError(
                f"{self.folder} holds what an interrupted run has found: add --resume to go on with it, or --overwrite "
                "to begin anew"
            )
        different = [name for name in self._header if former.get(name) != self._header[name]]
        if different:
            name = different[0]
            raise ClientError(
                f"{self.folder} belongs to another {name.replace('_', ' ')} ({_short(former.get(name))}, now "
                f"{_short(self._header[name])}): add --overwrite to begin anew"
            )
        if len(whole) < len(raw):
            os.truncate(journal, len(whole))

    def _append(self, line: Mapping[str, Any]) -> None:
        with naming(self.folder / JOURNAL):
            append_all(self._journal, (json.dumps(line) + "\n").encode())

    def mark(self, page: int, row0: int, crc: int) -> None:
        """Note that a band's pixels are in the store."""
        self.done[page, row0] = crc
        self._append({"page": page, "row": row0, "crc": crc})

    def allow_replacing(self) -> None:
        """Note that what has the outputs' names may be replaced, by whoever continues this run too."""
        if not self.may_replace:
            self.may_replace = True
            self._append({_MAY_REPLACE: True})

    def keep(self, store: RawStore, page: int, row0: int, rows: npt.NDArray[Any]) -> None:
        """Store a finished band and note it."""
        store.write(page, row0, rows)
        self.mark(page, row0, checksum(rows))

    def recall(self, store: RawStore, page: int, row0: int, row1: int) -> npt.NDArray[Any] | None:
        """A band that a former run has finished, or None if it has not, or its pixels did not reach the disk."""
        crc = self.done.get((page, row0))
        if crc is None:
            return None
        rows = store.read(page, row0, row1)
        if len(rows) == row1 - row0 and checksum(rows) == crc:
            return rows
        del self.done[page, row0]
        return None

    def close(self, *, finished: bool) -> None:
        """Let go of the folder; it is removed if the run has finished, or nothing was found yet."""
        os.close(self._journal)
        if finished or not self.done:
            # The journal goes first: without it a folder is only waste, however far this gets.
            (self.folder / JOURNAL).unlink()
            shutil.rmtree(self.folder)
        os.close(self._lock)


def checksum(rows: npt.NDArray[Any]) -> int:
    """The CRC-32 of pixels."""
    return zlib.crc32(np.ascontiguousarray(rows).tobytes())


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}..."
