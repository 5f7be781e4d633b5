"""NVIDIA's library, TensorRT or TensorRT-RTX: loaded lazily, its version, and what it says."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from unet.engine import EngineError

if TYPE_CHECKING:
    from typing import Protocol

    import tensorrt

    class Library(Protocol):
        """The module `tensorrt` or `tensorrt_rtx`: what is used of both, with TensorRT's types."""

        __name__: str
        __version__: str
        Builder: type[tensorrt.Builder]
        ILogger: type[tensorrt.ILogger]
        LayerInformationFormat: type[tensorrt.LayerInformationFormat]
        MemoryPoolType: type[tensorrt.MemoryPoolType]
        NetworkDefinitionCreationFlag: type[tensorrt.NetworkDefinitionCreationFlag]
        OnnxParser: type[tensorrt.OnnxParser]
        ProfilingVerbosity: type[tensorrt.ProfilingVerbosity]
        Runtime: type[tensorrt.Runtime]


@dataclass
class BuildLog:
    """What TensorRT says while it builds: (severity, text)."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    @property
    def last_error(self) -> str:
        """TensorRT's last error, on one line."""
        errors = [text for severity, text in self.lines if severity in ("ERROR", "INTERNAL_ERROR")]
        return " ".join(errors[-1].split()) if errors else "it gave no reason"

    def __str__(self) -> str:
        return "".join(f"{severity}: {text}\n" for severity, text in self.lines)


def load_library(name: str) -> Library:
    """TensorRT's Python module, "tensorrt" or "tensorrt_rtx".

    Raises:
        EngineError: it is not installed, or has no library beneath.
    """
    try:
        library = cast("Library", importlib.import_module(name))
    except (ImportError, OSError, RuntimeError) as error:
        extra = "gpu" if name == "tensorrt" else "rtx"
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise EngineError(
            f"{name} cannot be loaded ({reason}): install it with pip install 'unet-medical-triton[{extra}]'"
        ) from error
    if not hasattr(library, "Builder"):
        raise EngineError(f"{name} is installed without its libraries: install it from NVIDIA's package index")
    return library


def make_logger(trt: Library, log: BuildLog) -> tensorrt.ILogger:
    """A logger of TensorRT that writes into `log`."""
    base: Any = trt.ILogger

    class Logger(base):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.lines.append((severity.name, text))

    return Logger()
