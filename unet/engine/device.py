"""The GPU of this machine, through pycuda: loaded lazily, since it neither builds nor imports without CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unet.engine import EngineError


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name and compute capability, "MAJOR.MINOR"."""

    name: str
    compute_capability: str


def gpu(index: int = 0) -> Gpu:
    """A GPU of this machine.

    Raises:
        EngineError: pycuda is not installed, or there is no GPU or driver.
    """
    cuda = driver()
    try:
        cuda.init()
        device = cuda.Device(index)
    except cuda.Error as error:
        raise EngineError(f"no NVIDIA GPU can be used ({error}): run this on the machine with the GPU") from error
    return Gpu(str(device.name()), ".".join(map(str, device.compute_capability())))


def driver() -> Any:
    """The module pycuda.driver.

    Raises:
        EngineError: it cannot be loaded.
    """
    try:
        import pycuda.driver as cuda
    except ImportError as error:
        raise EngineError(
            f"pycuda cannot be loaded ({error}): on a machine with an NVIDIA GPU and the CUDA toolkit, "
            "pip install 'unet-medical-triton[gpu]'"
        ) from error
    return cuda
