from __future__ import annotations

from pathlib import Path

import pytest

from tools.demo import main


def test_a_folder_of_something_else_is_not_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["--quick", "--out", str(tmp_path), "--data_dir", str(tmp_path)]) == 2
    assert "holds something that a former `make demo` did not write" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
