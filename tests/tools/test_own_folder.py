from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools.nnunet import main as nnunet
from tools.own_folder import clear_own
from tools.tissues import main as tissues
from unet import phantom
from unet.errors import UnetError


def test_only_what_the_maker_left_is_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "out"
    clear_own(folder, "demo", UnetError)
    (folder / "results").mkdir()
    (folder / "results" / "a").touch()
    clear_own(folder, "demo", UnetError)
    assert [path.name for path in folder.iterdir()] == [".unet-demo"]
    with pytest.raises(UnetError, match=f"{folder} holds something that a former `make tissues` did not write"):
        clear_own(folder, "tissues", UnetError)
    assert [path.name for path in folder.iterdir()] == [".unet-demo"]
    (empty := tmp_path / "empty").mkdir()
    clear_own(empty, "tissues", UnetError)


def test_a_folder_of_something_else_is_not_cleared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert phantom.main(["--out", str(tmp_path / "data"), "--slices", "5", "--size", "96"]) == 0
    (out := tmp_path / "out").mkdir()
    (out / "thesis.tex").write_text("years of work")
    words = ["--out", str(out)]
    for main, more in ((nnunet, ["--python", sys.executable, "--data_dir", str(tmp_path / "data")]), (tissues, [])):
        assert main([*words, *more]) == 2
        assert "did not write: name another --out" in capsys.readouterr().err
        assert (out / "thesis.tex").read_text() == "years of work"
