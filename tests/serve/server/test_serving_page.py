"""The page on serving says of each section, and of each row of a table of states, how far it was tried."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

MARK = re.compile(r"(?:built and run|validated|not run)\b", re.IGNORECASE)
ELSEWHERE = re.compile(r"\*State (?:in the table|on that page)")


@pytest.fixture(scope="module")
def page(project_root: Path) -> str:
    return (project_root / "docs" / "serving.md").read_text(encoding="utf-8")


def test_each_section_says_how_far_it_was_tried(page: str, project_root: Path) -> None:
    sections = re.split(r"^#{2,} ", page, flags=re.MULTILINE)[1:]
    assert len(sections) > 10
    tests = {path.name for path in (project_root / "tests").rglob("test_*.py")}
    for section in sections:
        title, _, state, *_ = section.splitlines()
        assert re.fullmatch(r"\*.+\.\*", state), title
        assert MARK.match(state[1:]) or ELSEWHERE.match(state), title
        assert set(re.findall(r"`(test_\w+\.py)`", state)) <= tests, title
        if state.startswith("*State in the table"):
            assert "| state |\n" in section, title


def test_each_row_of_a_table_of_states_has_one(page: str) -> None:
    tables = re.findall(r"^\|.*\| state \|\n\|[-|:]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert len(tables) == 2
    for row in "".join(tables).splitlines():
        assert MARK.match(row.rstrip(" |").rpartition(" | ")[2]), row
