from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from serve.measure.trial import Load, Trial, TrialError, row, suggest
from serve.models.config import ModelSettings
from serve.repository import main as publish_command
from serve.trial import main


def test_the_command_serves_and_counts(
    tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--artefacts", str(tiny_artefacts), "--tile_size", "204", "--seconds", "0.2", "--clients", "1", "4"]
    out = tmp_path / "profile.json"
    assert main([*arguments, "--max_queue_size", "9", "--p99_ms", "60000", "--out", str(out)]) == 0
    heading, rule, *lines, _, said = capsys.readouterr().out.splitlines()
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["settings"] == {"max_queue_delay_us": 0, "max_queue_size": 9}
    assert said.endswith(found["command"])
    # What it suggests can be published.
    words = shlex.split(found["command"])[2:]
    assert publish_command([*words, "--model_repository", str(tmp_path / "models")]) == 0
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert heading.count("|") == rule.count("|") == lines[0].count("|")
    # Clients and images in a pass: a lone client's requests are never batched.
    assert [line[6] for line in cells] == ["1", "4"]
    assert cells[0][11] == "1.00"
    assert 1 <= float(cells[1][11]) <= 4
    # A queue limit takes two instances.
    assert (cells[0][1], cells[0][2]) == ("yes", "2")
    assert all(float(line[7]) > 0 for line in cells)


def tried(delay_us: int, instances: int, *loads: tuple[float, float]) -> Trial:
    """A trial with the (img/s, p99 ms) of each load."""
    settings = ModelSettings(max_queue_delay_us=delay_us, instances=instances)
    return Trial(settings, 1, 1, 1, tuple(Load(1, rate, 1, p99_ms, 0, 1, 1) for rate, p99_ms in loads))


def test_the_least_that_is_nearly_the_best_is_suggested() -> None:
    one, two = tried(0, 1, (30.0, 50.0), (96.0, 90.0)), tried(0, 2, (100.0, 80.0))
    late, fast = tried(500, 1, (100.0, 60.0)), tried(0, 1, (500.0, 200.0))
    assert suggest([late, two, one, fast], 100)[0] is one
    assert suggest([late, two], 100)[0] is two
    # Beyond the budget even the fastest is nothing, and without the rest there is nothing else.
    assert suggest([fast, late], 70)[0] is late
    with pytest.raises(TrialError, match=r"within 10 ms, the best within 50 ms: raise --p99_ms"):
        suggest([one, two, late, fast], 10)


def test_a_row_has_a_cell_for_every_heading() -> None:
    trial = Trial(ModelSettings(max_queue_delay_us=500, instances=3), 1.25, 40.4, 30.6, ())
    assert (
        row(trial, Load(16, 33.33, 480.2, 510.7, 420, 8.123, 54.6))
        == "| 0.5 | no | 3 | 1.2 | 40 | 31 | 16 | 33.3 | 480 | 511 | 420.0 | 8.12 | 55 |"
    )


@pytest.mark.parametrize("arguments", [["--seconds", "0"], ["--clients", "0"]])
def test_what_makes_no_sense_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)


def test_artefacts_that_are_none_are_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--artefacts", str(tmp_path)]) == 2
    assert "card.json does not exist" in capsys.readouterr().err
