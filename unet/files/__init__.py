"""Files that appear under their final name only when they are whole.

What is being written lies in a hidden folder beside it, ``.NAME.XXXXXXXX.aside``, which holds a locked file. When a
process is killed, the system frees its lock: the next process that writes into the same folder removes the leftover.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unet.files.naming import naming as naming

if sys.platform != "win32":
    import fcntl

_SUFFIX = ".aside"
_LOCK = ".lock"
_NO_LOCK = ".no-lock"
_FORMER = ".former"
# Of the Linux kernel's interface.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# What a network share answers when it does not know an operation; its files are as good as others.
_UNSUPPORTED = frozenset(
    {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM, errno.EACCES, errno.EBADF, errno.EISDIR, errno.ENOLCK}
)


def fsync(target: int | Path) -> None:
    """Have an open file, or the file or folder at a path, on the disk, where the file system can promise that.

    Raises:
        OSError: the disk is full or broken.
    """
    try:
        descriptor = target if isinstance(target, int) else os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            if not isinstance(target, int):
                os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


@contextlib.contextmanager
def hidden_folder(final: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``final`` that this process owns; it is removed with the block.

    What killed processes left in the same place is removed first.
    """
    with naming(final), contextlib.ExitStack() as stack:
        final.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(final.parent)
        lock = None
        while lock is None:
            folder = final.parent / f".{final.name}.{secrets.token_hex(4)}{_SUFFIX}"
            folder.mkdir()
            with contextlib.ExitStack() as unowned:
                unowned.callback(_clear, folder)
                lock = _own(folder)
                unowned.pop_all()
        stack.callback(os.close, lock)
        stack.callback(_clear, folder)
        yield folder


def _own(folder: Path) -> int | None:
    """Lock a new hidden folder; returns the lock's descriptor, None if a sweep took the folder for a leftover."""
    path = folder / _LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except FileNotFoundError:
        return None
    locked = take_lock(descriptor)
    if locked is None:
        os.replace(path, folder / _NO_LOCK)  # a sweep cannot tell whether this process lives: it must not judge
    elif not locked or not path.exists():
        os.close(descriptor)
        return None
    return descriptor


def take_lock(descriptor: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed; the system frees the lock of a process that was killed.

    Args:
        descriptor: of the file or folder.
        wait: until another process has freed it.

    Returns:
        False if another process holds it, None where the system or the file system has no locks.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def remove_abandoned(folder: str | os.PathLike[str], name: str = "*") -> None:
    """Remove what killed processes left half-written in ``folder``; a replacement that was cut off is undone.

    Args:
        folder: where to look.
        name: of the files or directories that they were writing, which may be a pattern.

    What a living process writes stays, and so does a leftover of another user that this one may not remove.
    """
    for aside in Path(folder).glob(f".{name}.*{_SUFFIX}"):
        with contextlib.suppress(OSError):
            try:
                descriptor = os.open(aside / _LOCK, os.O_RDWR)
            except FileNotFoundError:
                aside.rmdir()  # if it is empty: its owner ended before it made the lock, or makes another folder
                continue
            try:
                if take_lock(descriptor):
                    _clear(aside)
            finally:
                os.close(descriptor)


def _clear(aside: Path) -> None:
    """Remove a hidden folder; its lock goes last, so that a later sweep finds whatever could not be removed now."""
    with contextlib.suppress(OSError):
        _put_back(aside)
        for item in aside.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item, ignore_errors=True)
            elif item.name != _LOCK:
                item.unlink()
        if {item.name for item in aside.iterdir()} <= {_LOCK}:
            shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path) -> None:
    """Undo a replacement that was cut off after the former folder had left its place."""
    former = aside / _FORMER
    for item in former.iterdir() if former.is_dir() else ():
        if not (aside.parent / item.name).exists():
            os.replace(item, aside.parent / item.name)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a path to write to; on success it is synced and takes the name ``path``, else it is removed.

    The file's mode is what the umask leaves; a file that was made executable stays executable.
    """
    final = Path(path)
    with hidden_folder(final) as folder:
        aside = folder / final.name
        aside.touch()
        mode = aside.stat().st_mode
        yield aside
        _set_mode(aside, mode | (mode & 0o444) >> 2)
        fsync(aside)
        os.replace(aside, final)
        fsync(final.parent)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a directory to fill; on success it is synced and takes the name ``path``, else it is removed.

    A directory that stands at ``path`` already is replaced: both names are exchanged at once, so that a process killed
    at any moment leaves the old one or the new one under ``path``. All modes in it are what the umask leaves, also
    those of copied files.
    """
    final = Path(path)
    with hidden_folder(final) as folder:
        aside = folder / final.name
        aside.mkdir()
        mode = aside.stat().st_mode
        yield aside
        for item in aside.rglob("*"):
            if not item.is_symlink():
                _set_mode(item, mode)
                fsync(item)
        fsync(aside)
        if not final.exists():
            os.replace(aside, final)
        elif not _exchange(aside, final):
            _move_out(final, folder)
            os.replace(aside, final)
        fsync(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once; False where the system or the file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    # A layered file system does not rename a folder that came with a container's image.
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _set_mode(path: Path, allowed: int) -> None:
    """Give a file or folder the permissions in ``allowed``; files are executable only if they were."""
    mode = path.stat().st_mode
    wanted = (mode & ~0o777) | (allowed & 0o777)
    if path.is_file() and not mode & 0o100:
        wanted &= ~0o111
    if wanted != mode:
        with contextlib.suppress(OSError):  # a share may fix the modes of its files
            path.chmod(wanted & 0o7777)


def _move_out(path: Path, folder: Path) -> None:
    """Move a directory into a hidden folder, from which an interrupted replacement is undone."""
    former = folder / _FORMER
    former.mkdir()
    try:
        os.replace(path, former / path.name)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(path, former / path.name, symlinks=True)
        shutil.rmtree(path)


def remove_directory(path: str | os.PathLike[str]) -> None:
    """Remove a directory at once for whoever looks at its name, and then its files.

    Raises:
        OSError: it cannot be removed, and stays as it was.
    """
    final = Path(path)
    with hidden_folder(final) as folder:
        try:
            os.replace(final, folder / final.name)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.rmtree(final)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON.
    """
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """The value of JSON.

    Raises:
        ValueError: it is not JSON, or nested deeper than this reads.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


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
