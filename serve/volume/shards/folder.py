"""What the processes that share a volume know of each other: a folder with the plan, and a marker for each shard.

A marker is written after its shard's pixels are on the disk. It holds the hash of the plan's identity: input, model,
window, settings. Two processes that compute the same shard write the same bytes, so that no lock guards one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from typing import TYPE_CHECKING, Any

from serve.segment.errors import ClientError
from unet.files import fsync, naming, remove_directory, take_lock
from unet.volume.tiff.canvas import append_all

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

_PLAN, _DONE = "plan.json", "done"
FORMAT = 1


def recorded(folder: Path) -> dict[str, Any] | None:
    """The identity that a plan was begun with; None where there is no plan yet.

    Raises:
        ClientError: it is damaged.
    """
    try:
        return dict(json.loads((folder / _PLAN).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ClientError(f"{folder / _PLAN} is damaged ({error}): remove {folder} to begin anew") from error


class ShardFolder:
    """``NAME.shards``.

    Attributes:
        path: the folder.
        identity: SHA-256, in hexadecimal, of all that the bytes depend on.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        """Begin the plan, or join it.

        Args:
            path: the folder.
            identity: all that the bytes depend on, for JSON.

        Raises:
            ClientError: a plan of something else is there.
        """
        self.path = path
        wanted = json.loads(json.dumps({"format": FORMAT, **identity}))
        text = json.dumps(wanted, sort_keys=True, indent=1)
        self.identity = hashlib.sha256(text.encode()).hexdigest()
        (path / _DONE).mkdir(parents=True, exist_ok=True)
        self._publish_once(text)
        found = recorded(path) or {}
        different = [name for name in wanted if found.get(name) != wanted[name]]
        if different:
            raise ClientError(
                f"{path} belongs to another {different[0].replace('_', ' ')}: repeat the command as it was, or remove "
                "that folder to begin anew"
            )

    def _publish_once(self, text: str) -> None:
        """Give the plan its name, unless another process was faster: a link does not replace."""
        if (self.path / _PLAN).exists():
            return
        aside = self.path / f".{_PLAN}.{secrets.token_hex(4)}"
        _write(aside, text)
        try:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path / _PLAN)
        except OSError:  # a share without links; the plans of two processes are the same or refused above
            os.replace(aside, self.path / _PLAN)
        aside.unlink(missing_ok=True)

    def install(self, name: str, make: Callable[[Path], None]) -> None:
        """Have a folder under a name; of several processes that make it one wins.

        Args:
            name: inside this folder.
            make: fills a folder of its own, which has ``name`` in it afterwards.
        """
        if (self.path / name).exists():
            return
        aside = self.path / f".{name}.{secrets.token_hex(4)}"
        aside.mkdir()
        make(aside)
        with contextlib.suppress(OSError):  # there is one now
            (aside / name).rename(self.path / name)
        shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A file name of this process alone; the file is removed with the block."""
        path = self.path / f".scratch.{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def mark(self, name: str) -> None:
        """Note that something is whole and on the disk."""
        aside = self.path / _DONE / f".{name}.{secrets.token_hex(4)}"
        _write(aside, self.identity)
        os.replace(aside, self.path / _DONE / name)

    def marked(self) -> set[str]:
        """The names of all markers, unread; none of a folder that is gone."""
        try:
            return {item.name for item in (self.path / _DONE).iterdir() if not item.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def is_marked(self, name: str) -> bool:
        """Whether something was noted; a marker that a crash of the machine tore does not count."""
        try:
            return (self.path / _DONE / name).read_text(encoding="utf-8") == self.identity
        except (FileNotFoundError, ValueError):
            return False

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Wait until no other process finishes this volume; False if one has done so, and the folder is gone."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except FileNotFoundError:
            yield False
            return
        try:
            take_lock(descriptor, wait=True)
            yield self.path.exists()
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        """Remove the folder, at once for whoever looks at its name."""
        remove_directory(self.path)


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with naming(path):
            append_all(descriptor, text.encode())
            fsync(descriptor)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
