"""What runs an exported network on this machine: OpenVINO or ONNX Runtime on a CPU, a TensorRT plan on a GPU."""

from __future__ import annotations

from unet.errors import UnetError


class EngineError(UnetError):
    """An engine, a library or a GPU that cannot be used here, or an input that an engine cannot take."""
