"""Writes bills of materials as CycloneDX: ``python -m tools.sbom environment|wheel|image``.

cyclonedx-py and debsbom make the lists, each in an environment of its own, so that no list holds its own maker.
"""

from __future__ import annotations

import argparse
import email
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

from unet import __version__
from unet.errors import UnetError, command, say
from unet.files import atomic_file, sha256_of

if TYPE_CHECKING:
    from collections.abc import Sequence

CYCLONEDX, DEBSBOM = "cyclonedx-bom==7.5.0", "debsbom[cdx]==0.10.2"
SPEC = "1.6"
PROJECT = "pyproject.toml"
CONSTRAINTS = Path("constraints.txt")
# In cyclonedx-py's environment, which has the library of CycloneDX with its schemas.
_CHECK = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
fault = JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())
sys.exit(None if fault is None else str(fault))
"""

Bom = dict[str, Any]


class SbomError(UnetError):
    """A bill of materials that cannot be made."""


def check(text: bytes) -> None:
    """Hold a bill of materials against CycloneDX's own schema.

    Raises:
        SbomError: it is not of that schema.
    """
    _tool(CYCLONEDX, "python", "-c", _CHECK, stdin=text)


def of_environment(python: Path, *more: str) -> Bom:
    """What is installed in an environment, by its interpreter; ``more`` flags go to cyclonedx-py."""
    flags = ("--output-reproducible", "--spec-version", SPEC, *more)
    made: Bom = json.loads(_tool(CYCLONEDX, "cyclonedx-py", "environment", *flags, str(python)))
    return made


def of_wheel(wheel: Path) -> Bom:
    """What a wheel of this project requires, at the versions of constraints.txt.

    What only an extra asks for has the scope "optional". A requirement that has other versions on other Pythons is in
    it once for each.
    """
    with ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(packed.read(name))
    wanted: dict[str, str] = {}
    for line in metadata.get_all("Requires-Dist", []):
        scope = "optional" if "extra ==" in line else "required"
        name = _normal(re.split(r"[^\w.-]", line, maxsplit=1)[0])
        wanted[name] = "required" if "required" in (scope, wanted.get(name)) else scope
    locked = [line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if _locked(line) in wanted]
    missing = wanted.keys() - {_locked(line) for line in locked}
    if missing:
        raise SbomError(f"{CONSTRAINTS} has no version of {', '.join(sorted(missing))}: run `make constraints`")
    flags = ("--output-reproducible", "--spec-version", SPEC, "-")
    made: Bom = json.loads(_tool(CYCLONEDX, "cyclonedx-py", "requirements", *flags, stdin="\n".join(locked).encode()))
    for component in made["components"]:
        component["scope"] = wanted[_normal(component["name"])]
    root = {
        "type": "library",
        "name": metadata["Name"],
        "version": metadata["Version"],
        "purl": f"pkg:pypi/{_normal(metadata['Name'])}@{metadata['Version']}",
        "licenses": [{"license": {"id": "Apache-2.0"}}],
        "hashes": [{"alg": "SHA-256", "content": sha256_of(wheel)}],
    }
    return _under(root, made)


def of_image(name: str, packages: Path) -> Bom:
    """What is in an image, by the archive that docker/packages.sh makes of it.

    Raises:
        SbomError: the archive cannot be read.
    """
    flags = ("--sbom-type", "cdx", "--cdx-schema-version", SPEC, "--root", "-", "--out", "-", "--distro-name", name)
    debian: Bom = json.loads(_tool(DEBSBOM, "debsbom", "generate", *flags, stdin=packages.read_bytes()))
    distribution = debian["metadata"]["component"]["bom-ref"]
    debian["dependencies"] = [one for one in debian["dependencies"] if one["ref"] != distribution]
    return _under({"type": "container", "name": name, "version": __version__}, debian, _python_in(packages))


def _python_in(packages: Path) -> Bom:
    """The Python packages in such an archive: their metadata in an environment that has nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([_uv(), "venv", "--quiet", "--python", sys.executable, folder], check=True)
        (site,) = Path(folder).glob("lib/python*/site-packages")
        try:
            with tarfile.open(packages) as archive:
                for member in archive:
                    found = re.search(r"[^/]+\.(?:dist|egg)-info(?:/.*)?$", member.name)
                    if found is not None:
                        member.name = found[0]
                        archive.extract(member, site, filter="data")
        except tarfile.TarError as error:
            raise SbomError(f"{packages} is no archive of docker/packages.sh ({error})") from error
        return of_environment(Path(folder) / "bin" / "python")


def _under(root: dict[str, Any], *parts: Bom) -> Bom:
    """One bill of materials of several, whose components all belong to ``root``."""
    root = {"bom-ref": root["name"], **root}
    components = [component for part in parts for component in part["components"]]
    needs = {"ref": root["bom-ref"], "dependsOn": sorted(component["bom-ref"] for component in components)}
    tools = [tool for part in parts for tool in part["metadata"]["tools"]["components"]]
    return {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "version": 1,
        "metadata": {"component": root, "tools": {"components": tools}},
        "components": components,
        "dependencies": [needs, *(one for part in parts for one in part["dependencies"])],
    }


def _normal(name: str) -> str:
    """The one spelling of a package's name."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _locked(line: str) -> str:
    """The package of a line of constraints.txt."""
    return _normal(line.partition("==")[0])


def _uv() -> str:
    return str(Path(sys.executable).parent / "uv")


def _tool(package: str, *words: str, stdin: bytes = b"") -> bytes:
    """What a program of a package on PyPI writes.

    Raises:
        SbomError: it failed.
    """
    line = [_uv(), "tool", "run", "--quiet", "--constraints", str(CONSTRAINTS), "--from", package, *words]
    done = subprocess.run(line, input=stdin, capture_output=True, check=False)
    if done.returncode:
        raise SbomError(f"{words[0]} of {package} failed: {done.stderr.decode(errors='replace')}")
    return done.stdout


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write one bill of materials."""
    parser = argparse.ArgumentParser(prog="tools.sbom", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the file")
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("environment", help="what is installed beside this Python")
    kinds.add_parser("wheel", help="what a wheel of this project requires").add_argument("wheel", type=Path)
    image = kinds.add_parser("image", help="what is in an image")
    image.add_argument("name")
    image.add_argument("packages", type=Path, help="the archive that docker/packages.sh writes")
    chosen = parser.parse_args(argv)
    if chosen.kind == "environment":
        made = of_environment(Path(sys.executable), "--pyproject", PROJECT)
    elif chosen.kind == "wheel":
        made = of_wheel(chosen.wheel)
    else:
        made = of_image(chosen.name, chosen.packages)
    text = f"{json.dumps(made, indent=2)}\n".encode()
    check(text)
    with atomic_file(chosen.out) as aside:
        aside.write_bytes(text)
    say(f"{chosen.out}: {len(made['components'])} components")
    return 0


if __name__ == "__main__":
    sys.exit(main())
