"""Where the counts of the campaigns come together."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path

from unet.errors import say


def report(lines: Sequence[str], out: Path, findings: Sized) -> int:
    """Print a campaign's page and add it to a file; the command's exit code, 1 if there are findings."""
    with out.open("a", encoding="utf-8") as stream:
        stream.write("\n".join(lines) + "\n")
    say("\n".join(lines))
    return 1 if findings else 0
