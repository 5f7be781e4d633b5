from __future__ import annotations

from pathlib import Path

import pytest

from serve.model_config import ModelSettings
from serve.trial import Load, Trial, main, row


def test_the_command_serves_and_counts(tiny_artefacts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--artefacts", str(tiny_artefacts), "--tile_size", "204", "--seconds", "0.2", "--clients", "1", "4"]
    assert main([*arguments, "--max_queue_size", "9"]) == 0
    heading, rule, *lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert heading.count("|") == rule.count("|") == lines[0].count("|")
    # Clients and images in a pass: a lone client's requests are never batched.
    assert [line[6] for line in cells] == ["1", "4"]
    assert cells[0][11] == "1.00"
    assert 1 <= float(cells[1][11]) <= 4
    # A queue limit takes two instances.
    assert (cells[0][1], cells[0][2]) == ("yes", "2")
    assert all(float(line[7]) > 0 for line in cells)


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
