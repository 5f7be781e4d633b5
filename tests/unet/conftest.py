"""Settings of this room's tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is slow at times; how long a property takes says nothing about it.
settings.register_profile("unet", deadline=None)
settings.load_profile("unet")
