from __future__ import annotations

import pytest

from train.run.progress import watched


def test_without_a_terminal_long_work_says_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.run.progress._LINE_EVERY_S", 0.0)
    assert list(watched("abc", "letters read")) == ["a", "b", "c"]
    out, err = capsys.readouterr()
    assert (out + err).splitlines() == [f"{done} of 3 letters read" for done in range(3)]


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watched(range(3), "numbers read")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_of_several_ranks_the_first_one_says_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("train.run.progress._LINE_EVERY_S", 0.0)
    monkeypatch.setenv("HOROVOD_RANK", "1")
    assert list(watched("abc", "letters read")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
