"""What every volume can do, whatever its format: the one protocol that trainer, client, scores and report ask."""

from __future__ import annotations

import contextlib
import hashlib
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from unet.files import sha256_of
from unet.volume.limits import IMAGE_LIMITS, Limits, StackError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from unet.volume.metadata import StackMetadata

Opened = TypeVar("Opened", bound="Volume")
# Of pixels that are read at once where nothing else bounds it.
BLOCK_PX = 2**22


class Volume(ABC):
    """An open volume as a sequence of equal grey slices, read by blocks of rows; a context manager.

    Attributes:
        path: the file or folder.
        pages: number of slices; time points, channels and depths are counted through, the last fastest.
        height: rows of each.
        width: columns of each.
        dtype: of the pixels, in the machine's own byte order.
        metadata: pixel size and axes, which a file written of this volume keeps.
    """

    path: Path
    pages: int
    height: int
    width: int
    dtype: np.dtype[Any]
    metadata: StackMetadata

    @abstractmethod
    def rows(self, page: int, row0: int, row1: int) -> npt.NDArray[Any]:
        """Rows ``row0`` to ``row1`` of slice ``page``, [R, width].

        Raises:
            IndexError: if there is no such slice.
            StackError: if its pixels cannot be decoded.
        """

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What tells whether the volume is still the same, for JSON. It may be found beside the reading of pixels."""

    @abstractmethod
    def changed(self) -> bool:
        """Whether it was written to or replaced since it was opened."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open."""

    def channel_of(self, page: int) -> int:
        """Which channel slice ``page`` shows, from 0 on."""
        return self.metadata.channel_of(page)

    def check_page(self, page: int) -> None:
        """Refuse a slice that is not there.

        Raises:
            IndexError: saying so.
        """
        if not 0 <= page < self.pages:
            raise IndexError(f"{self.path} has {self.pages} pages; there is no page {page}")

    def check_whole(self, limits: Limits) -> None:
        """Refuse to read a whole slice that is too large for the memory of most machines.

        Raises:
            StackError: saying so.
        """
        if self.height * self.width > limits.max_pixels_at_once:
            raise StackError(
                f"{self.path} has slices of {self.height} x {self.width} pixels, and here they are read whole, up to "
                f"{limits.max_pixels_at_once} pixels: cut the slices into smaller ones"
            )

    def __len__(self) -> int:
        return self.pages

    def __getitem__(self, page: int) -> npt.NDArray[Any]:
        """Slice ``page``, [height, width], counted from 0; errors as those of ``rows``."""
        self.check_whole(IMAGE_LIMITS)
        return self.rows(page, 0, self.height)

    def __iter__(self) -> Iterator[npt.NDArray[Any]]:
        return (self[page] for page in range(self.pages))

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FileIdentity:
    """Whether a file is still the one that it was when it was opened."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = self._look()
        self._fingerprint: dict[str, Any] = {}

    def _look(self) -> tuple[int, int, int, int] | None:
        try:
            about = self._path.stat()
        except FileNotFoundError:
            return None
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns

    def fingerprint(self) -> dict[str, Any]:
        """The size in bytes and the SHA-256 in hexadecimal, found once."""
        if not self._fingerprint:
            self._fingerprint = {"bytes": self._path.stat().st_size, "sha256": sha256_of(self._path)}
        return self._fingerprint

    def changed(self) -> bool:
        """Whether it was written to, or another one has its name now; one that was moved away has not changed."""
        return self._look() not in (self._first, None)


class FolderIdentity:
    """Whether the files in a folder are still the ones that they were."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._first: str | None = None

    def _look(self) -> str:
        digest = hashlib.sha256()
        for folder, names, files in os.walk(self._folder):
            names.sort()
            for name in sorted(files):
                place = Path(folder, name).relative_to(self._folder).as_posix()
                with contextlib.suppress(FileNotFoundError):  # removed at this moment: not there is what counts
                    about = Path(folder, name).stat()
                    digest.update(f"{place}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def fingerprint(self) -> dict[str, Any]:
        """A SHA-256, in hexadecimal, over names, sizes and times of the files.

        The pixels themselves are not read: a volume may be larger than anyone wants to read twice.
        """
        self._first = self._first or self._look()
        return {"sha256": self._first}

    def changed(self) -> bool:
        """Whether a file was written, added or removed since ``fingerprint`` was first asked for."""
        return self._first is not None and self._look() != self._first
