from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tools.demo import follow_log, main


def test_a_folder_of_something_else_is_not_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["--quick", "--out", str(tmp_path), "--data_dir", str(tmp_path)]) == 2
    assert "holds something that is not a former demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_log_is_followed_until_its_writer_ends(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    code = (
        "import json, sys\nwith open(sys.argv[1], 'a') as log:\n    for step in range(50):\n"
        "        line = 'DLLL ' + json.dumps({'step': step}) + '\\n'\n"
        "        for part in (line[:9], line[9:]):\n            log.write(part)\n            log.flush()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)]) as writer:
        assert [event["step"] for event in follow_log(path, writer)] == list(range(50))
    assert json.loads(path.read_text().splitlines()[0][5:]) == {"step": 0}
