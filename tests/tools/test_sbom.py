"""`make sbom` lists what is installed and what the wheel requires, in a form that CycloneDX's own schema takes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

from tools import sbom
from unet.files import sha256_of

pytestmark = pytest.mark.slow

STATUS = """Package: dpkg
Status: install ok installed
Architecture: amd64
Version: 1.21.22
Maintainer: Dpkg Developers <debian-dpkg@lists.debian.org>
Description: Debian package management system

Package: libc6
Status: install ok installed
Architecture: amd64
Source: glibc
Version: 2.36-9+deb12u14
Maintainer: GNU Libc Maintainers <debian-glibc@lists.debian.org>
Description: GNU C Library

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1
Maintainer: Nobody <nobody@example.org>
Description: removed, with its settings left
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture(scope="module")
def made(project_root: Path) -> dict[str, Any]:
    """What `make sbom` writes, by the names of the files."""
    subprocess.run(["make", "sbom"], cwd=project_root, check=True, capture_output=True)
    files = {name: project_root / "sbom" / f"{name}.cdx.json" for name in ("environment", "wheel")}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items()}


def test_it_lists_every_installed_package(made: dict[str, Any]) -> None:
    listed = made["environment"]
    assert (listed["bomFormat"], listed["specVersion"]) == ("CycloneDX", "1.6")
    found = {(normal(one["name"]), one["version"]) for one in listed["components"]}
    # Of a process of its own: other tests' libraries add places to the path of this one.
    code = "from importlib.metadata import distributions as all; print(*(f'{d.name}=={d.version}' for d in all()))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    installed = {(normal(name), version) for name, version in (one.split("==") for one in done.stdout.split())}
    project = normal(listed["metadata"]["component"]["name"])
    assert found == {(name, version) for name, version in installed if name != project}
    assert ("tritonclient", metadata.version("tritonclient")) in found
    # The generator's own packages are not the project's.
    assert not any(name == "cyclonedx-bom" for name, _ in found)


def test_it_lists_what_the_wheel_requires_at_the_locked_versions(made: dict[str, Any], project_root: Path) -> None:
    root = made["wheel"]["metadata"]["component"]
    (wheel,) = (project_root / "dist").glob(f"unet_medical_triton-{root['version']}-*.whl")
    assert root["hashes"] == [{"alg": "SHA-256", "content": sha256_of(wheel)}]
    with ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        said = packed.read(name).decode()
    wanted = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.+)$", said, re.MULTILINE)]
    found = {(normal(one["name"]), one["version"]): one for one in made["wheel"]["components"]}
    assert {name for name, _ in found} == {normal(one.name) for one in wanted}
    locked = (project_root / "constraints.txt").read_text(encoding="utf-8").lower()
    for name, version in found:
        assert re.search(rf"^{name}=={re.escape(version)}(?: ;|$)", locked, re.MULTILINE), name
    # One for this Python, and one for newer ones; an extra's package is optional.
    assert found["tritonclient", metadata.version("tritonclient")]["scope"] == "required"
    assert len([name for name, _ in found if name == "tritonclient"]) == 2
    assert found["tensorflow", "2.15.1"]["scope"] == "optional"
    needs = {one["ref"]: one.get("dependsOn", []) for one in made["wheel"]["dependencies"]}
    assert set(needs[root["bom-ref"]]) == {one["bom-ref"] for one in found.values()}


@pytest.mark.parametrize("name", ["environment", "wheel"])
def test_the_schema_takes_it_and_refuses_another(made: dict[str, Any], name: str) -> None:
    text = json.dumps(made[name])
    sbom.check(text.encode())
    with pytest.raises(sbom.SbomError):
        sbom.check(text.replace('"library"', '"book"').encode())


def packages(path: Path, files: dict[str, str]) -> Path:
    """An archive like those of docker/packages.sh."""
    with tarfile.open(path, "w") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_an_images_list_holds_debians_packages_and_pythons(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project_root)
    site = "opt/venv/lib/python3.11/site-packages/tritonclient-2.50.0.dist-info"
    wheel = "opt/tritonserver/nvidia_pytriton-0.5.12.dist-info"
    egg = "opt/venv/lib/python3.11/site-packages/horovod-0.28.1-py3.11.egg-info"
    archive = packages(
        tmp_path / "packages.tar",
        {
            "var/lib/dpkg/status": STATUS,
            f"{site}/METADATA": "Metadata-Version: 2.1\nName: tritonclient\nVersion: 2.50.0\n",
            f"{wheel}/METADATA": "Metadata-Version: 2.1\nName: nvidia-pytriton\nVersion: 0.5.12\n",
            f"{egg}/PKG-INFO": "Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n",
        },
    )
    out = tmp_path / "image.cdx.json"
    assert sbom.main(["--out", str(out), "image", "unet-test", str(archive)]) == 0
    made = json.loads(out.read_text(encoding="utf-8"))
    assert {one["purl"] for one in made["components"]} == {
        "pkg:deb/debian/dpkg@1.21.22?arch=source",
        "pkg:deb/debian/dpkg@1.21.22?arch=amd64",
        "pkg:deb/debian/glibc@2.36-9%2Bdeb12u14?arch=source",
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u14?arch=amd64",
        "pkg:pypi/tritonclient@2.50.0",
        "pkg:pypi/nvidia-pytriton@0.5.12",
        "pkg:pypi/horovod@0.28.1",
    }
    assert made["metadata"]["component"]["name"] == "unet-test"
    first = out.read_bytes()
    assert sbom.main(["--out", str(out), "image", "unet-test", str(archive)]) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize("content", [b"", b"nothing"])
def test_what_is_no_archive_is_one_sentence(content: bytes, tmp_path: Path, project_root: Path) -> None:
    (tmp_path / "packages.tar").write_bytes(content)
    words = ["--out", str(tmp_path / "out"), "image", "unet-test", str(tmp_path / "packages.tar")]
    line = [sys.executable, "-m", "tools.sbom", *words]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_requirement_that_is_not_locked_is_one_sentence(
    tmp_path: Path, project_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(project_root)
    wheel = tmp_path / "x-1-py3-none-any.whl"
    with ZipFile(wheel, "w") as packed:
        said = "Metadata-Version: 2.1\nName: x\nVersion: 1\nRequires-Dist: numpy\nRequires-Dist: not-locked>=1\n"
        packed.writestr("x-1.dist-info/METADATA", said)
    assert sbom.main(["--out", str(tmp_path / "out"), "wheel", str(wheel)]) == 2
    assert capsys.readouterr().err == "error: constraints.txt has no version of not-locked: run `make constraints`\n"
    assert not (tmp_path / "out").exists()
