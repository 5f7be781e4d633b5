"""Errors that name the file that is being written."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Let an error of the system name the file that is being written, where it names none or its hidden folder.

    Raises:
        OSError: of the same number, with ``path``.
    """
    try:
        yield
    except OSError as error:
        named, hidden = error.filename2 or error.filename, f"{os.sep}.{Path(path).name}."
        if error.errno is None or (named is not None and hidden not in str(named)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
