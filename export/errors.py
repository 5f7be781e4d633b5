"""The errors of the exporter: one class, and one of its own for what does not compute the network."""

from __future__ import annotations

from unet.errors import UnetError


class ExportError(UnetError):
    """An export that cannot be done as asked."""


class ParityError(ExportError):
    """A file whose output is not that of the file that it was made from, within the tolerance."""
