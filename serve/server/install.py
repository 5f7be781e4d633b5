"""Finds the tritonserver in the nvidia-pytriton wheel, and lays out what it needs to run outside a container."""

from __future__ import annotations

import ctypes.util
import os
import sys
import sysconfig
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from serve.models.library import OWN_BACKEND, own_library
from unet.errors import UnetError
from unet.files import atomic_directory

if TYPE_CHECKING:
    from collections.abc import Mapping

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


class TritonError(UnetError):
    """A Triton that cannot be found, started or stopped."""


@dataclass(frozen=True)
class Installation:
    """One installed tritonserver, laid out to run outside a container.

    Attributes:
        version: of the package that carries it.
        server: the program.
        caches: what ``--cache-directory`` takes.
        backends: what ``--backend-directory`` takes.
        libraries: folders for the dynamic linker, the first searched first.
    """

    version: str
    server: Path
    caches: Path
    backends: Path
    libraries: tuple[Path, ...]

    def environment(self, base: Mapping[str, str] | None = None) -> dict[str, str]:
        """``base``, or this process's environment, as the server needs it.

        Its libraries are found, and ``python`` on the path is this very Python: the stub of the python backend embeds
        libpython and takes the packages of the first ``python`` on the path.
        """
        base = os.environ if base is None else base
        libraries = [*(str(path) for path in self.libraries), *filter(None, [base.get("LD_LIBRARY_PATH")])]
        programs = [str(Path(sys.executable).parent), *filter(None, [base.get("PATH")])]
        return {
            **base,
            "LD_LIBRARY_PATH": os.pathsep.join(libraries),
            "PATH": os.pathsep.join(programs),
        }


def find_installation(cache_dir: Path) -> Installation:
    """The tritonserver of the installed nvidia-pytriton wheel.

    Args:
        cache_dir: where the backends are laid out, for this and later servers.

    Raises:
        TritonError: the package, or the libpython that the python backend embeds, is missing.
    """
    spec = util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise TritonError("nvidia-pytriton, which carries tritonserver, is missing: pip install '.[serve]'")
    package = Path(next(iter(spec.submodule_search_locations)))
    root, version = package / "tritonserver", metadata.version("nvidia-pytriton")
    server = root / "bin" / "tritonserver"
    if not os.access(server, os.X_OK):
        raise TritonError(f"{server} is missing or not executable: pip install --force-reinstall '.[serve]'")
    libraries = (package.parent / "nvidia_pytriton.libs", _libpython_folder())
    return Installation(
        version=version,
        server=server,
        caches=root / "caches",
        backends=_stage_backends(root, cache_dir / f"backends-{version}-python{PYTHON}"),
        libraries=tuple(path for path in libraries if path is not None),
    )


def _stage_backends(root: Path, staged: Path) -> Path:
    """Link the backends as tritonserver wants them: the python backend with the stub of this Python, and our own."""
    stub = root / "python_backend_stubs" / PYTHON / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonError(f"nvidia-pytriton has no python backend for Python {PYTHON}: use Python 3.9, 3.10 or 3.11")
    files = [path for path in (*(root / "backends" / "python").iterdir(), stub) if path.is_file()]
    sources = {f"python/{path.name}": path for path in files}
    if (library := own_library()).is_file():
        sources[f"{OWN_BACKEND}/{library.name}"] = library
    if all((staged / name).resolve() == path.resolve() for name, path in sources.items()):
        return staged
    with atomic_directory(staged) as aside:
        for name, path in sources.items():
            (aside / name).parent.mkdir(exist_ok=True)
            (aside / name).symlink_to(path)
    return staged


def _libpython_folder() -> Path | None:
    """Where this Python's shared library lies; None when the dynamic linker finds it anyway."""
    folder, name = sysconfig.get_config_var("LIBDIR"), f"libpython{PYTHON}.so.1.0"
    if folder and (Path(folder) / name).exists():
        return Path(folder)
    if ctypes.util.find_library(f"python{PYTHON}") is None:
        raise TritonError(
            f"{name}, which Triton's python backend embeds, is missing: "
            f"install it (Debian: apt-get install libpython{PYTHON})"
        )
    return None
