"""Files that appear under their final name only when they are whole."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if sys.platform != "win32":
    import fcntl

_FORMER = ".former"
# Of the Linux kernel's interface.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path beside ``path`` to write to; on success it is synced and renamed, else removed."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=final.suffix, dir=final.parent)
    os.close(descriptor)
    aside = Path(name)
    try:
        yield aside
        aside.chmod(0o644)
        _fsync(aside)
        os.replace(aside, final)
        _fsync(final.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a directory beside ``path`` to fill; on success it is synced and renamed, else removed.

    A directory that stands at ``path`` already is replaced: both names are exchanged at once, so that a process killed
    at any moment leaves the old one or the new one under ``path``. What killed processes left beside it is removed.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    _repair(final)
    remove_abandoned(final.parent, final.name)
    aside, owner = _owned_directory(final)
    try:
        yield aside
        aside.chmod(0o755)
        for item in aside.rglob("*"):
            _fsync(item)
        _fsync(aside)
        if not final.exists():
            os.replace(aside, final)
        elif not _exchange(aside, final):
            os.replace(final, _former(final))
            os.replace(aside, final)
            _repair(final)
        _fsync(final.parent)
    finally:
        # After an exchange this is the replaced one.
        shutil.rmtree(aside, ignore_errors=True)
        os.close(owner)


def remove_abandoned(folder: Path, name: str) -> None:
    """Remove the directories that killed processes were filling for ``name``, which may be a pattern, in ``folder``."""
    for aside in folder.glob(f".{name}.*"):
        if not aside.is_dir() or aside.name.endswith(_FORMER):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(aside, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(aside, ignore_errors=True)
            finally:
                os.close(descriptor)


def _owned_directory(final: Path) -> tuple[Path, int]:
    """A new directory beside ``final``, and a descriptor whose lock says that a living process fills it."""
    while True:
        aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        with contextlib.suppress(OSError):
            descriptor = os.open(aside, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if aside.exists():
                return aside, descriptor
            # Another process took it for abandoned before it was locked.
            os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _former(final: Path) -> Path:
    """Where a directory waits while another takes its place, on a file system that cannot exchange names."""
    return final.with_name(f".{final.name}{_FORMER}")


def _repair(final: Path) -> None:
    """End a replacement that a kill broke off: bring the former directory back, or remove it where it was replaced."""
    former = _former(final)
    if former.exists() and not final.exists():
        os.replace(former, final)
    elif former.exists():
        shutil.rmtree(former)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    with atomic_file(path) as aside:
        aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sha256_of(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file, or of a directory's files with their relative names, in hexadecimal."""
    root = Path(path)
    digest = hashlib.sha256()
    if root.is_dir():
        for item in sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(f"{item.relative_to(root).as_posix()}\0{sha256_of(item)}\n".encode())
        return digest.hexdigest()
    with root.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
