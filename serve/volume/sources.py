"""Which volumes the words of a command line mean."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from serve.segment.errors import ClientError
from unet.errors import warn
from unet.volume.ngff.remote import remote_address
from unet.volume.opening import holds_slices, is_volume, made_here

if TYPE_CHECKING:
    from collections.abc import Sequence

_NAMED = 3


def expanded(names: Sequence[str]) -> list[Path]:
    """The named volumes; a pattern is replaced by what it matches, or stays where its files are slices of one stack.

    Of what a pattern matches, former results of this program and what is no volume are left out, with a line.

    Raises:
        ClientError: if a pattern matches nothing that can be read.
    """
    found: list[Path] = []
    for name in names:
        if Path(name).exists() or not glob.has_magic(name) or remote_address(Path(name)):
            found.append(Path(name))
            continue
        matches = [Path(match) for match in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207 - absolute ones too
        if not matches:
            raise ClientError(f"nothing matches {name}: check the pattern")
        volumes = [path for path in matches if not _unfinished(path) and is_volume(path) and not made_here(path)]
        if not volumes:
            raise ClientError(f"nothing that {name} matches is a volume that can be read: check the pattern")
        if len(volumes) > 1 and holds_slices(volumes[0]):
            found.append(Path(name))
            continue
        if left := [path.name for path in matches if path not in set(volumes)]:
            more = " ..." if len(left) > _NAMED else ""
            warn(f"{len(left)} matches of {name} are no inputs ({', '.join(left[:_NAMED])}{more}): left out")
        found.extend(volumes)
    return list(dict.fromkeys(found))


def _unfinished(path: Path) -> bool:
    """Whether a path lies in what an interrupted run has left."""
    return any(part.endswith((".partial", ".shards")) for part in path.parts)
