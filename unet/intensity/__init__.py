"""Intensities: the window that brings a volume to 8 bits, the same in the trainer and the client, and normalisation."""

from __future__ import annotations

from unet.intensity.percentiles import DTYPES, Window
from unet.intensity.windows import (
    SLICE,
    STACK,
    WindowChoice,
    Windows,
    find_windows,
    normalise,
    parse_window,
    to_uint8,
)

__all__ = [
    "DTYPES",
    "SLICE",
    "STACK",
    "Window",
    "WindowChoice",
    "Windows",
    "find_windows",
    "normalise",
    "parse_window",
    "to_uint8",
]
