from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from serve.measure import common
from serve.measure.common import MeasureError
from serve.measure.open_loop import SecondOpinion
from serve.measure.trial import HEADINGS, Load, Trial, row, suggest
from serve.models.config import ModelSettings
from serve.repository import main as publish_command
from serve.trial import main


def test_the_command_serves_and_counts(
    tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A hundred requests are enough for the test, and at these rates a busy machine keeps up.
    monkeypatch.setitem(common.LEAST_REQUESTS, 99, 100)
    arguments = ["--artefacts", str(tiny_artefacts), "--tile_size", "204", "--seconds", "0.2", "--clients", "4"]
    arguments += ["--rates", "20", "40", "--requests", "100", "--no_perf_analyzer"]
    out = tmp_path / "profile.json"
    assert main([*arguments, "--max_queue_size", "900", "--p99_ms", "60000", "--out", str(out)]) == 0
    heading, rule, *lines, _, said = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["settings"] == {"max_queue_delay_us": 0, "max_queue_size": 900}
    assert said.endswith(found["command"])
    # What it suggests can be published.
    words = shlex.split(found["command"])[2:]
    assert publish_command([*words, "--model_repository", str(tmp_path / "models")]) == 0
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert heading.count("|") == rule.count("|") == lines[0].count("|")
    assert [line[7] for line in cells] == ["20.0", "40.0"]
    assert all(1 <= float(line[13]) <= 16 for line in cells)
    # They tell a 99th percentile.
    assert all(float(line[10]) >= float(line[9]) > 0 for line in cells)
    # A queue limit takes two instances.
    assert (cells[0][1], cells[0][2]) == ("yes", "2")


def test_a_combination_that_fails_does_not_cost_the_others(
    tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a queue of one, most of the requests of several clients are refused."""
    arguments = ["--artefacts", str(tiny_artefacts), "--tile_size", "204", "--seconds", "0.2", "--clients", "16"]
    arguments += ["--max_queue_size", "1", "0", "--rates", "100", "--requests", "20", "--no_perf_analyzer"]
    assert main([*arguments, "--out", str(tmp_path / "profile.json")]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3
    assert "needs 1,000 requests at each rate: raise --requests" in said.err


def tried(delay_us: int, instances: int, *loads: tuple[float, float]) -> Trial:
    """A trial with the (rate, p99 ms) of each load."""
    settings = ModelSettings(max_queue_delay_us=delay_us, instances=instances)
    return Trial(settings, 1, 1, 1, 1, tuple(load_of(rate, p99_ms) for rate, p99_ms in loads))


def load_of(rate: float, p99_ms: float | None, *, kept: bool = True) -> Load:
    return Load(rate, kept, "", 1, p99_ms, 0, 1, 1, SecondOpinion())


def test_the_least_that_is_nearly_the_best_is_suggested() -> None:
    one, two = tried(0, 1, (30.0, 50.0), (96.0, 90.0)), tried(0, 2, (100.0, 80.0))
    late, fast = tried(500, 1, (100.0, 60.0)), tried(0, 1, (500.0, 200.0))
    assert suggest([late, two, one, fast], 100)[0] is one
    assert suggest([late, two], 100)[0] is two
    # Beyond the budget even the fastest is nothing, and without the rest there is nothing else.
    assert suggest([fast, late], 70)[0] is late
    with pytest.raises(MeasureError, match=r"within 10 ms, the best within 50 ms: raise --p99_ms"):
        suggest([one, two, late, fast], 10)


def test_what_is_not_known_is_not_suggested() -> None:
    settings = ModelSettings()
    with pytest.raises(MeasureError, match="needs 1,000 requests at each rate"):
        suggest([Trial(settings, 1, 1, 1, 1, (load_of(10, None),))], 1000)
    with pytest.raises(MeasureError, match="no rate was kept"):
        suggest([Trial(settings, 1, 1, 1, 1, (load_of(10, 5.0, kept=False),))], 1000)


def test_a_row_has_a_cell_for_every_heading() -> None:
    trial = Trial(ModelSettings(max_queue_delay_us=500, instances=3), 1.25, 40.4, 30.6, 66.66, ())
    load = Load(33.3, False, "30.1, not kept", 480.2, None, 420, 8.123, 54.6, SecondOpinion(12, 34.4, "unstable"))
    cells = row(trial, load)
    assert len(cells) == len(HEADINGS)
    assert cells[:9] == ["0.5", "no", "3", "1.2", "40", "31", "66.7", "33.3", "30.1, not kept"]
    assert cells[9:] == ["480", "-", "34 (unstable)", "420.0", "8.12", "55"]


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--clients", "0"], ["--rates", "0"], ["--requests", "0"]])
def test_what_makes_no_sense_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "must be positive" in capsys.readouterr().err


def test_artefacts_that_are_none_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--artefacts", str(tmp_path)]) == 2
    assert "card.json does not exist" in capsys.readouterr().err
