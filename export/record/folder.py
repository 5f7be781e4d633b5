"""The folder of an export belongs to one process at a time."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from export.errors import ExportError
from unet.files import take_lock

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Hold a folder of artefacts, which need not exist yet, while it is written.

    Raises:
        ExportError: another process holds it.
    """
    folder = out.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    descriptor = _locked(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _locked(lock: Path) -> int:
    """A descriptor of the lock's file, locked; its holder removes the file before it lets go."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        if take_lock(descriptor) is False:
            os.close(descriptor)
            held = lock.with_name(lock.name[1 : -len(".lock")])
            raise ExportError(f"another process writes {held}: wait for it, or name another folder")
        with contextlib.suppress(FileNotFoundError):
            if os.stat(lock).st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        # The former holder removed the file after it was opened here.
        os.close(descriptor)
