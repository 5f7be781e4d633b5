"""The error of publishing."""

from __future__ import annotations

from unet.errors import UnetError


class RepositoryError(UnetError):
    """A model that cannot be published or served."""
