"""With what and by which command an artefact was made."""

from __future__ import annotations

import os
import platform
import shlex
from importlib import metadata
from typing import TYPE_CHECKING, Any

from unet import __version__
from unet.files import atomic_file
from unet.measure import markdown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from unet.card import Card

PAGE = "card.md"


def versions(*packages: str) -> dict[str, str]:
    """Versions of this project, Python and the named installed packages; those not installed are left out."""
    found = {"unet-medical-triton": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def tensorflow_package() -> str:
    """The name under which TensorFlow is installed here."""
    return "tensorflow" if "tensorflow" in versions("tensorflow") else "tensorflow-cpu"


def shell(*words: str | os.PathLike[str]) -> str:
    """A command line to paste into a shell."""
    return shlex.join(str(word) for word in words)


def write_card(card: Card) -> None:
    """Write a card into its folder, as ``card.json`` and as a page to read, ``card.md``."""
    card.save()
    with atomic_file(card.folder / PAGE) as aside:
        aside.write_text(card_page(card), encoding="utf-8")


def card_page(card: Card) -> str:
    """``card.json`` as a page to read, in Markdown."""
    size = card.tile_sizes[0]
    lines = [
        "# U-Net artefacts",
        "",
        f"{card.model['parameters']:,} parameters, {card.model['base_filters']} filters at the first level; "
        f"tiles of {', '.join(map(str, card.tile_sizes))}.",
        "",
    ]
    if card.has_engine:
        engine = card.engine
        lines += [
            f"Engine: {engine.kind} in {engine.precision} on `{engine.file}`, {engine.img_per_s:.2f} tiles of {size} x "
            f"{size} per second, one at a time, on {card.model['machine']['cpu']} "
            f"with {card.model['machine']['cores']} cores.",
            "",
        ]
    made = [
        [entry.file, f"`{entry.sha256[:12]}`", entry.parent or "", f"`{entry.command}`"]
        for entry in card.artefacts.values()
    ]
    lines.append(markdown(["artefact", "SHA-256", "made from", "command"], made, "llll"))
    lines += ["", f"Every step was run on {card.model['parity_tiles']}.", "", _parity_table(card.parity), ""]
    if card.model["scores"]:
        lines += ["Scores of whole slices that training did not see:", ""]
        rows = [
            [row["step"], f"{row['v_rand']:.4f}", f"{row['v_info']:.4f}", f"{row['ratio']:.4f} ({row['least']:g})"]
            for row in card.model["scores"]
        ]
        lines += [markdown(["step", "V_rand thin", "V_info thin", "share kept (accepted)"], rows, "lrrr"), ""]
    if card.has_engine and card.model["scores"]:
        lines += ["![the slice where the engine differs most](worst_slice.png)", ""]
        lines += ["*Slice, SavedModel, engine, ten times their difference.*", ""]
    return "\n".join(lines)


def _parity_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            *(row["step"], row["against"], row["quantity"]),
            f"{row['max_difference']:.1e} ({row['max_accepted']:.0e})",
            f"{row['flipped_share']:.1e} ({row['flipped_accepted']:.0e})",
            "" if row["accepted"] else "not used",
        ]
        for row in rows
    ]
    head = ["step", "against", "quantity", "largest difference (accepted)", "pixels flipped (accepted)", ""]
    return markdown(head, lines, "lllrrl")
