from __future__ import annotations

import pytest

from train.run.progress import progress, watched


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(watched(range(3), "numbers read")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "said"), [("0", "0 of 3 letters read\n"), ("1", "")])
def test_of_several_ranks_the_first_one_says_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: str, said: str
) -> None:
    """Among the other lines of a run, on standard output."""
    monkeypatch.setenv("HOROVOD_RANK", rank)
    shown = progress(3, "letters read")
    shown.say(shown.line())
    assert capsys.readouterr() == (said, "")
