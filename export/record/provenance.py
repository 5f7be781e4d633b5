"""With what and by which command an artefact was made."""

from __future__ import annotations

import platform
import shlex
from importlib import metadata
from typing import TYPE_CHECKING

from unet import __version__

if TYPE_CHECKING:
    import os


def versions(*packages: str) -> dict[str, str]:
    """Versions of this project, Python and the named installed packages; those not installed are left out."""
    found = {"unet-medical-triton": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def tensorflow_package() -> str:
    """The name under which TensorFlow is installed here."""
    return "tensorflow" if "tensorflow" in versions("tensorflow") else "tensorflow-cpu"


def shell(*words: str | os.PathLike[str]) -> str:
    """A command line to paste into a shell."""
    return shlex.join(str(word) for word in words)
