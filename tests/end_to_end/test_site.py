"""The documentation as a site: it builds without a warning, and a reader's browser loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.fixture(scope="module")
def site(project_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    line = [str(Path(sys.executable).parent / "mkdocs"), "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        line,
        cwd=project_root,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=[\"']([^\"']+)", text)
        links = re.findall(r"<link[^>]*>", text)
        loaded += [link for link in links if re.search(r"stylesheet|preload|preconnect|icon", link)]
        assert len(loaded) > 2
        assert [one for one in loaded if re.search(r"(^|[\"' =])(https?:)?//", one)] == [], page.name
    for sheet in site.rglob("*.css"):
        text = sheet.read_text(encoding="utf-8")
        assert not re.search(r"""(@import|url\()\s*["']?(https?:)?//""", text), sheet.name


def test_every_page_is_in_the_navigation(project_root: Path) -> None:
    config = yaml.safe_load((project_root / "mkdocs.yml").read_text(encoding="utf-8"))

    def named(entries: list[object]) -> set[str]:
        found: set[str] = set()
        for entry in entries:
            for target in entry.values() if isinstance(entry, dict) else [entry]:
                found |= named(target) if isinstance(target, list) else {str(target)}
        return found

    docs = project_root / "docs"
    assert named(config["nav"]) == {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}


def test_the_reference_shows_docstrings(site: Path) -> None:
    page = (site / "reference" / "segmenting.html").read_text(encoding="utf-8")
    assert "segment_volume" in page
    assert "What is wanted of a volume." in page
