"""Records the names in NVIDIA's binding wheels: ``python tests/export/plan/record_tensorrt_names.py WHEEL...``.

The wheels (tensorrt-cu12-bindings 10.4.0 and 11.4.0) install anywhere and import nowhere without TensorRT's libraries,
but each class, method and enumeration member is in them as a string, and so is each error that the bindings raise. What
this writes is what the tests hold the exporter's calls against.
"""

from __future__ import annotations

import hashlib
import re
import sys
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent / "tensorrt_names"
ERROR = re.compile(rb"Error in [A-Za-z ]+\.?(?=\0)")
IDENTIFIER = re.compile(rb"(?<![A-Za-z0-9_])[A-Za-z_][A-Za-z0-9_]{2,60}(?=\0)")


def record(wheel: Path) -> Path:
    """Write one wheel's names, one a line, after a line with the wheel's name and hash."""
    with zipfile.ZipFile(wheel) as opened:
        (library,) = (name for name in opened.namelist() if name.endswith("/tensorrt.so"))
        content = opened.read(library)
    names = {found.decode() for found in IDENTIFIER.findall(content)}
    names = {name for name in names if not name.startswith(("_Z", "__"))}
    version = ".".join(wheel.name.split("-")[1].split(".")[:3])
    target = FOLDER / f"{version}.txt"
    raised = sorted({f"# raises: {found.decode()}" for found in ERROR.findall(content)})
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    lines = [f"# {wheel.name} sha256 {digest}", *raised, *sorted(names)]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        sys.stdout.write(f"{record(Path(argument))}\n")
