"""Serve the exported network with Triton, segment stacks with it, and measure it.

The names below are the public Python interface; what they need is loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serve.segment.address import Tls
    from serve.segment.errors import ClientError, ServerError
    from serve.segment.segmenter import Segmenter
    from serve.volume.request import Request, Summary
    from serve.volume.run import segment_volume

__all__ = ["ClientError", "Request", "Segmenter", "ServerError", "Summary", "Tls", "segment_volume"]

_HOMES = {
    "ClientError": "segment.errors",
    "Request": "volume.request",
    "Segmenter": "segment.segmenter",
    "ServerError": "segment.errors",
    "Summary": "volume.request",
    "Tls": "segment.address",
    "segment_volume": "volume.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
