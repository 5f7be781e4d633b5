"""Where commands find what ``make demo`` made, when nothing else is named."""

from __future__ import annotations

from pathlib import Path

# Where `make demo` leaves what it makes.
DEMO = Path("demo")


def own_or_demo(path: Path, usual: str) -> Path:
    """The path to read; if it is the usual one and does not exist, the one that ``make demo`` made.

    Args:
        path: what was asked for.
        usual: the default, relative to the working folder; the demo has the same under ``demo``.
    """
    return DEMO / usual if path == Path(usual) and not path.exists() and (DEMO / usual).exists() else path
