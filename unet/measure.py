"""Things measured in turn: each meets the machine's moods alike, and a ratio is taken within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

Figure = TypeVar("Figure")


def interleave(subjects: Mapping[str, Callable[[], Figure]], rounds: int) -> dict[str, list[Figure]]:
    """Call every subject once in each round, another one first each time, and return what they gave.

    None is always the one after the slowest, which would find its caches, or its heat.
    """
    names = list(subjects)
    found: dict[str, list[Figure]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(subjects[name]())
    return found


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """The same thing as a subject whose figure is the seconds that it takes."""

    def measure() -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    return measure


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """One figure over another, round by round, sorted: its middle is the ratio and its ends are the spread."""
    return sorted(above / below for above, below in zip(over, under))
