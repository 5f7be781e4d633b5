"""Measuring several things in turn, and the table that shows the figures.

Other work on the machine then slows all of them alike, and a ratio is taken within one round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

Figure = TypeVar("Figure")


def interleave(subjects: Mapping[str, Callable[[], Figure]], rounds: int) -> dict[str, list[Figure]]:
    """Call every subject once in each round, and return what they gave.

    Each round starts with another subject, so that none always runs after the slowest, with the caches or the heat that
    this one left.
    """
    names = list(subjects)
    found: dict[str, list[Figure]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(subjects[name]())
    return found


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """A subject whose figure is the seconds that ``run`` takes."""

    def measure() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return measure


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """One figure divided by another in each round, sorted: the median is the ratio, the ends are the spread."""
    return sorted(above / below for above, below in zip(over, under))


def markdown(head: Sequence[str], lines: Iterable[Sequence[object]], align: str = "") -> str:
    """An aligned Markdown table.

    Args:
        head: the columns' headings.
        lines: cells of each line; what is no text is shown by ``str``.
        align: "l" or "r" for each column; by default all are flush right.
    """
    rows = [list(head), *([str(cell).replace("|", "/") for cell in line] for line in lines)]
    sides = align or "r" * len(head)
    widths = [max(3, *(len(row[column]) for row in rows)) for column in range(len(head))]
    rule = ["-" * width if side == "l" else "-" * (width - 1) + ":" for width, side in zip(widths, sides)]
    text = []
    for row in (rows[0], rule, *rows[1:]):
        cells = zip(row, widths, sides)
        padded = [cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in cells]
        text.append(f"| {' | '.join(padded)} |")
    return "\n".join(text)
