"""The root of the trainer's errors."""

from __future__ import annotations

from unet.errors import UnetError


class TrainError(UnetError):
    """A flag, a stack of slices, a checkpoint or a run that cannot be used; the sentence says which and what to do."""
