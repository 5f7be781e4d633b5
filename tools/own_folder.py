"""Folders that a command of this project made, which it may clear when it runs again."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from unet.errors import UnetError


def clear_own(folder: Path, maker: str, error: type[UnetError]) -> None:
    """An empty folder, marked as the maker's; what the maker left in it before is removed.

    Args:
        folder: may exist or not.
        maker: the target of ``make`` that fills it.
        error: to raise.

    Raises:
        UnetError: the folder holds something, and has not the maker's mark.
    """
    mark = folder / f".unet-{maker}"
    if folder.exists() and any(folder.iterdir()):
        if not mark.exists():
            raise error(f"{folder} holds something that a former `make {maker}` did not write: name another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.touch()
