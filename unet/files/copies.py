"""Copies of folders without the modes, times and links of their files, which not every file system can give."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_LEFT_OUT = "__pycache__"


def copy_files(source: Path, target: Path) -> Path:
    """Copy the files below a folder, but not what Python compiled of them; returns the copy.

    Args:
        source: the folder.
        target: another, which need not exist.

    Raises:
        OSError: a file cannot be read or written.
    """
    target.mkdir(parents=True, exist_ok=True)
    for item in sorted(source.iterdir()):
        if item.is_dir() and item.name != _LEFT_OUT:
            copy_files(item, target / item.name)
        elif item.is_file():
            shutil.copyfile(item, target / item.name)
    return target
