"""Where the libraries of our own in C++ lie; nothing that has to be installed is imported here."""

from __future__ import annotations

import sys
from pathlib import Path

# Triton's name of the backend in C++, whose sources lie in openvino_backend/.
OWN_BACKEND = "unet_openvino"


def own_library() -> Path:
    """Where the library of our own backend lies, or would lie: in the environment of this Python."""
    return Path(sys.prefix) / "lib" / "triton" / OWN_BACKEND / f"libtriton_{OWN_BACKEND}.so"


def arguments_library() -> Path:
    """Where the library lies, or would lie, that keeps the admin key out of the list of processes."""
    return Path(sys.prefix) / "lib" / "triton" / "unet_arguments" / "libunet_arguments.so"
