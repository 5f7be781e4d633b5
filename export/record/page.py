"""The card as a page to read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from unet.card import SHORT_HASH
from unet.files import atomic_file
from unet.measure import markdown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from unet.card import Card
    from unet.card.records import Proof

PAGE = "card.md"
WORST = "worst_slice.png"


def write_card(card: Card) -> None:
    """Write a card into its folder, as ``card.json`` and as a page to read, ``card.md``.

    Raises:
        CardError: an artefact is not the recorded one, or is of another parent.
    """
    card.save()
    with atomic_file(card.folder / PAGE) as aside:
        aside.write_text(card_page(card), encoding="utf-8")


def card_page(card: Card) -> str:
    """``card.json`` as a page to read, in Markdown."""
    lines = [
        "# U-Net artefacts",
        "",
        f"{card.model['parameters']:,} parameters, {card.model['base_filters']} filters at the first level; "
        f"tiles of {', '.join(map(str, card.tile_sizes))}.",
        "",
        *_engine_lines(card),
    ]
    made = [
        [entry.file, f"`{entry.sha256[:SHORT_HASH]}`", entry.parent or "", f"`{entry.command}`"]
        for entry in card.artefacts.values()
    ]
    lines.append(markdown(["artefact", "SHA-256", "made from", "command"], made, "llll"))
    proofs = dict(_proofs(card))
    lines += ["", f"Every step was run on {card.model['parity_tiles']}.", "", _parity_table(proofs), ""]
    if any(proof.scores for proof in proofs.values()):
        lines += ["Scores of whole slices that training did not see:", "", _score_table(proofs), ""]
    for name, proof in proofs.items():
        if "peaks" in proof.facts:
            lines += [*_peak_lines(name, proof.facts), ""]
    if (card.folder / WORST).is_file():
        lines += [f"![the slice where the engine differs most]({WORST})", ""]
        lines += ["*Slice, SavedModel, engine, ten times their difference.*", ""]
    return "\n".join(lines)


def _engine_lines(card: Card) -> list[str]:
    if not card.has_engine:
        return []
    engine, size, made_on = card.engine, card.tile_sizes[0], card.model["machine"]
    lines = [
        f"Engine: {engine.kind} in {engine.precision} on `{engine.file}`, {engine.img_per_s:.2f} tiles of {size} x "
        f"{size} per second, one at a time, on {made_on['cpu']} with {made_on['cores']} cores "
        f"({', '.join(made_on['instructions']) or 'no vector instructions'}).",
        "",
    ]
    refused = card.model.get("engines_refused", {})
    lines += [f"- {name} is not used: {reason}." for name, reason in refused.items()]
    return [*lines, ""] if refused else lines


def _proofs(card: Card) -> Iterator[tuple[str, Proof]]:
    """By artefact, then by engine."""
    for name, artefact in card.artefacts.items():
        if artefact.proof is not None:
            yield name, artefact.proof
    engines = {f"{one.kind} {one.precision}": one for one in card.engines}
    for name, engine in engines.items():
        if engine.proof is not None:
            yield name, engine.proof


def _parity_table(proofs: dict[str, Proof]) -> str:
    lines = [
        [
            *(row["step"], row["against"], row["quantity"]),
            f"{row['max_difference']:.1e} ({row['max_accepted']:.0e})",
            f"{row['flipped_share']:.1e} ({row['flipped_accepted']:.0e})",
        ]
        for proof in proofs.values()
        for row in proof.comparisons
    ]
    head = ["step", "against", "quantity", "largest difference (accepted)", "pixels flipped (accepted)"]
    return markdown(head, lines, "lllrr")


def _score_table(proofs: dict[str, Proof]) -> str:
    lines = [
        [row["step"], f"{row['v_rand']:.4f}", f"{row['v_info']:.4f}", f"{row['ratio']:.4f} ({row['least']:g})"]
        for proof in proofs.values()
        if (row := proof.scores)
    ]
    return markdown(["step", "V_rand thin", "V_info thin", "share kept (accepted)"], lines, "lrrr")


def _peak_lines(name: str, facts: dict[str, Any]) -> list[str]:
    lines = [
        f"Largest results of the layers of {name}, float16 ends at 65504:",
        "",
        markdown(["layer", "peak"], [[layer, f"{peak:.4g}"] for layer, peak in facts["peaks"].items()], "lr"),
    ]
    for layer, factor in facts.get("divided", {}).items():
        lines += ["", f"{layer} is divided by {factor:g}, and what follows is multiplied by it: the same function."]
    return lines
