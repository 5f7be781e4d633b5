"""`make sbom` lists what is installed, in a form that CycloneDX's own schema takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1], encoding="utf-8").read())
sys.exit(None if fault is None else str(fault))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.slow
def test_it_lists_every_installed_package_and_is_valid(project_root: Path, tmp_path: Path) -> None:
    subprocess.run(["make", "sbom"], cwd=project_root, check=True, capture_output=True)
    path = project_root / "sbom.cdx.json"
    listed = json.loads(path.read_text(encoding="utf-8"))
    assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6")
    found = {(normal(one["name"]), one["version"]) for one in listed["components"]}
    installed = {(normal(one.name), one.version) for one in metadata.distributions()}
    project = normal(listed["metadata"]["component"]["name"])
    assert found == {(name, version) for name, version in installed if name != project}
    # The generator's own packages are not the project's.
    assert not any(name == "cyclonedx-bom" for name, _ in found)

    uv, check = Path(sys.executable).parent / "uv", tmp_path / "check.py"
    check.write_text(VALIDATE, encoding="utf-8")
    library = ["--with", "cyclonedx-python-lib[json-validation]==11.12.0"]
    words = [uv, "run", "--isolated", "--no-project", *library, "python", check]
    subprocess.run([*map(str, words), str(path)], check=True, capture_output=True, cwd=tmp_path)
    (tmp_path / "wrong.json").write_text(
        path.read_text(encoding="utf-8").replace('"library"', '"book"'), encoding="utf-8"
    )
    wrong = subprocess.run(
        [*map(str, words), str(tmp_path / "wrong.json")], check=False, capture_output=True, cwd=tmp_path
    )
    assert wrong.returncode != 0
