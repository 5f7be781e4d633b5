"""Errors that name the file that is being written."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# All that numpy's tofile says of a write that failed.
_TOFILE = re.compile(r"(\d+) requested and (\d+) written")


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the system name the file that is being written, where it names none or its hidden folder.

    Raises:
        OSError: of the same number, with ``path``; EIO where numpy, which knew the number, did not say it.
    """
    try:
        yield
    except OSError as error:
        count = _TOFILE.fullmatch(str(error))
        if count is not None:
            text = f"the disk took {count[2]} of {count[1]} values"
            raise OSError(errno.EIO, text, str(path)) from error
        named, hidden = error.filename2 or error.filename, f"{os.sep}.{Path(path).name}."
        if error.errno is None or (named is not None and hidden not in str(named)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
