"""The page on the export is true: each check that it tells of has its test, and its table is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from unet.engine.targets import TARGETS


@pytest.fixture(scope="module")
def page(project_root: Path) -> str:
    return (project_root / "docs" / "export.md").read_text(encoding="utf-8")


def test_each_named_test_is_there(page: str, project_root: Path) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 30
    assert len(named) == page.count(".py::")
    for file, function in named:
        paths = list((project_root / "tests").rglob(file))
        assert any(f"def {function}(" in path.read_text(encoding="utf-8") for path in paths), f"{file}::{function}"


def test_each_claim_says_what_it_rests_on(page: str) -> None:
    claims = page.partition("What each claim rests on:")[2].partition("CUDA graphs")[0]
    rows = [line.split(" | ") for line in claims.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        assert re.match("proved here|proved by contract|not run", row[1]), row
        assert ("test_" in row[2]) == (not row[1].startswith("not run")), row


def test_the_table_of_gpus_is_the_codes(page: str) -> None:
    for one in TARGETS.values():
        cells = (one.name, one.compute_capability, one.tensorrt, one.triton, one.profile, one.memory_gib)
        assert f"| {' | '.join(map(str, cells))} |" in page
