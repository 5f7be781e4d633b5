"""Cards and runs' records with other entries than were written, sealed like the product's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unet.card import CARD_FILE, seal_of


def rewrite_card(folder: Path, **entries: Any) -> None:
    """Replace entries of a folder's card."""
    path = folder / CARD_FILE
    values = {**json.loads(path.read_text(encoding="utf-8")), **entries}
    path.write_text(sealed(values), encoding="utf-8")


def rewrite_record(run: Path, **entries: Any) -> None:
    """Replace entries of a training run's record; write one where there is none."""
    path = run / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(sealed({**values, **entries}), encoding="utf-8")


def sealed(values: dict[str, Any]) -> str:
    """The text of a card or a record of these entries."""
    return json.dumps({**values, "seal": seal_of(values)})
