"""Runs a command as its script does and notes what it raised: ``python -m tests.torture.raised MODULE ...``.

The error's class, and those of what it was made from, go into the file that ``RAISED`` names, one a line.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unet.errors import command


def run(module: str, argv: Sequence[str]) -> int:
    """The exit code of a command."""
    main = importlib.import_module(module).main.__wrapped__

    @command
    def noting(argv: Sequence[str] | None = None) -> int:
        try:
            return int(main(argv))
        except Exception as error:
            chain: list[BaseException] = [error]
            while (cause := chain[-1].__cause__) is not None:
                chain.append(cause)
            Path(os.environ["RAISED"]).write_text("\n".join(type(one).__qualname__ for one in chain))
            raise

    return int(noting(argv))


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
