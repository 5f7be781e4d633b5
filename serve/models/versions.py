"""The versions of a model in its folder: which there are, which was never finished, and which are too old."""

from __future__ import annotations

import re
from pathlib import Path

from serve.models.config import CONFIG_FILE, RepositoryError
from serve.models.seal import read_config
from unet.card import CARD_FILE
from unet.files import remove_directory

_NAMED = re.compile(r"card_sha256_\d+")


def versions_in(folder: Path) -> list[int]:
    """The versions in a model's folder, the oldest first.

    Raises:
        RepositoryError: one has a name that Triton takes for another number.
    """
    named = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    for path in named:
        if path.name != str(int(path.name)):
            raise RepositoryError(
                f"{path} is named with leading zeros, or not in plain digits, and Triton would not find its files: "
                f"rename it to {int(path.name)}, or remove it"
            )
    return sorted(int(path.name) for path in named)


def former_version(folder: Path) -> int:
    """The newest version that differs from the present one.

    Raises:
        RepositoryError: there is none.
    """
    *others, present = versions_in(folder) or [0]
    for version in reversed(others):
        if content_of(folder / str(version)) != content_of(folder / str(present)):
            return version
    raise RepositoryError(f"{folder} has no version that differs from the present one: publish one")


def content_of(version: Path) -> list[bytes]:
    """What makes a version what it is; the card holds the hash of the network."""
    return [path.read_bytes() for name in (CARD_FILE, CONFIG_FILE) if (path := version / name).exists()]


def remove_unfinished(folder: Path) -> None:
    """Remove the newest version if its publisher was killed before the configuration named it.

    No server starts with it, and who publishes or goes back again must not count it as the present one.

    Args:
        folder: the model's.

    Raises:
        RepositoryError: see `versions_in`.
    """
    *others, newest = versions_in(folder) or [0]
    config = folder / CONFIG_FILE
    if config.exists():
        names = set(read_config(config).parameters)
        # Another's configuration names none.
        unfinished = any(map(_NAMED.fullmatch, names)) and f"card_sha256_{newest}" not in names
    else:
        unfinished = not others
    if newest and unfinished and (folder / str(newest) / CARD_FILE).is_file():
        remove_directory(folder / str(newest))


def too_old(folder: Path, keep: int) -> list[Path]:
    """The versions beyond the ``keep`` newest.

    Where all of these are the same, as after a publish that was repeated, the newest that differs is not too old: it is
    what there is to go back to.
    """
    versions = [folder / str(version) for version in versions_in(folder)]
    old, kept = versions[:-keep], versions[-keep:]
    present = content_of(kept[-1])
    if keep > 1 and all(content_of(version) == present for version in kept):
        differing = [version for version in old if content_of(version) != present]
        old = [version for version in old if version not in differing[-1:]]
    return old
