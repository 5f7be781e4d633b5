from __future__ import annotations

from functools import partial

import pytest

from unet.measure import interleave, markdown, ratios, timed


def test_every_round_calls_every_subject_once_another_one_first() -> None:
    calls: list[str] = []

    def subject(name: str) -> int:
        calls.append(name)
        return len(calls)

    found = interleave({name: partial(subject, name) for name in "abc"}, 4)
    assert "".join(calls) == "abcbcacababc"
    assert found == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_ratios_are_taken_within_a_round() -> None:
    assert ratios([2.0, 20.0, 6.0], [1.0, 10.0, 2.0]) == [2.0, 2.0, 3.0]


def test_a_timed_subject_gives_its_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([5.0, 7.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    done = []
    assert timed(lambda: done.append("it"))() == 2.5
    assert done == ["it"]


def test_a_table_is_aligned() -> None:
    lines = [["fold 0", 0.9731], ["a|b", 1]]
    assert markdown(["name", "score"], lines, "lr").splitlines() == [
        "| name   |  score |",
        "| ------ | -----: |",
        "| fold 0 | 0.9731 |",
        "| a/b    |      1 |",
    ]
    assert markdown(["n"], []) == "|   n |\n| --: |"
