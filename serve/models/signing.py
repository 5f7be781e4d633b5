"""Whose signature the publisher asks for, and with whose key it signs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from unet.card.signature import verify

if TYPE_CHECKING:
    from pathlib import Path

    from unet.card.signature import Signer


@dataclass(frozen=True)
class Signing:
    """What publishing does with signatures.

    Attributes:
        public_key: file with the key whose signature is required; None takes unsigned folders too.
        signer: signs the version, whose configuration and code are made here; None leaves it unsigned.
    """

    public_key: Path | None = None
    signer: Signer | None = None

    def check(self, folder: Path) -> None:
        """Refuse a folder that lacks the required signature."""
        if self.public_key is not None:
            verify(folder, self.public_key)


NO_SIGNING = Signing()
