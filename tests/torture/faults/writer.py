"""One writer of the product: how it is driven, and what it leaves."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# What differs from one run to the next.
_TIMES = (
    (re.compile(rb'"(timestamp|elapsedtime|datetime|created)": "[^"]*"'), rb'"\1": ""'),
    # They cover the times.
    (re.compile(rb'"(sha256|seal)": "[^"]*"'), rb'"\1": ""'),
)
_KEY, _UUID = re.compile(rb"[\w-]{43}\n"), re.compile(rb'"urn:uuid:[^"]*"')
# The second line of a signature, and the third and fourth, which cover the time.
_SIGNATURE = re.compile(rb"(?s)\n.*")
JOBS = "tests.torture.faults.jobs"
Files = dict[str, bytes]


@dataclass(frozen=True)
class Writer:
    """One writer.

    Attributes:
        name: of it.
        call: "module:function".
        argv: makes the arguments, from the folder that it may write into.
        prepare: has in that folder what must be there before.
        finals: patterns of the names that count as final ones, below the folder.
        commits: names of files; once one of them is the new one, the command has done what it was to do.
        kept: what of the work is kept in the folder, as a number, and what a repeat says that it took over.
        timed: whether the files hold the time of the run, or what is drawn, which is left out of comparisons.
        libraries: that are loaded before the first run, since they take long.
        unsound: what is wrong with what an ended run leaves, where final names have several contents in turn.
    """

    name: str
    call: str
    argv: Callable[[Path], list[str]]
    prepare: Callable[[Path], None] = lambda folder: None
    finals: tuple[str, ...] = ("*",)
    commits: tuple[str, ...] = ()
    kept: Callable[[Path], int] = lambda folder: 0
    timed: bool = False
    libraries: tuple[str, ...] = ()
    unsound: Callable[[Path], list[str]] = lambda folder: []

    def files(self, folder: Path) -> Files:
        """Every file below the folder, and every empty folder, with what it holds."""
        found = {}
        for path in sorted(folder.rglob("*")):
            name = str(path.relative_to(folder))
            if path.is_file() and not (self.timed and name == "log.json"):
                found[name] = self._timeless(name, path.read_bytes())
            elif path.is_dir() and not any(path.iterdir()):
                found[f"{name}/"] = b""
        return found

    def _timeless(self, name: str, content: bytes) -> bytes:
        if self.timed and name.endswith((".json", ".md")):
            for pattern, instead in _TIMES:
                content = pattern.sub(instead, content)
        if self.timed and name.endswith(".tif"):
            content = _UUID.sub(b"a UUID", content)
        if name.endswith(".minisig"):
            content = _SIGNATURE.sub(b"", content)
        if self.timed and name.endswith(".zip") and zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as packed:
                content = b"".join(one.encode() + packed.read(one) for one in sorted(packed.namelist()))
        return _KEY.sub(b"a key", content) if name == "admin.key" else content
