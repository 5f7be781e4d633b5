"""Which of Triton's backends runs a CPU engine: our own, where its library is built, or the python backend."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serve.models.errors import RepositoryError
from serve.models.library import OWN_BACKEND, own_library
from unet.card import CARD_FILE
from unet.engine.cpu import EngineChoice, native
from unet.engine.memory import bytes_per_pixel
from unet.files import sha256_of

if TYPE_CHECKING:
    from unet.card import Card

AUTO, OPENVINO, PYTHON = BACKENDS = ("auto", "openvino", "python")
# Triton's name of it.
PYTHON_BACKEND = "python"
# What the first of a version's files is for our own backend and for the python backend; the configuration names it.
ENGINE_FILE, BACKEND_CODE_FILE = "engine.txt", "model.py"


def cpu_backend(card: Card, wanted: str) -> tuple[str, str]:
    """The name of the backend that runs a card's CPU engine.

    Our own runs OpenVINO in the server's process, without copies. It gives the same answers to the bit.

    Args:
        card: whose engine is served.
        wanted: "auto", "openvino" (our own) or "python".

    Returns:
        The name, and what a user should know of it, or "".

    Raises:
        RepositoryError: our own is insisted on and cannot be had.
    """
    if wanted == PYTHON:
        return PYTHON_BACKEND, ""
    if not _runs_in_openvino(card):
        if wanted == OPENVINO:
            raise RepositoryError(
                f"{card.folder / CARD_FILE} names {card.engine.kind} {card.engine.precision}, or a fallback, that "
                f"OpenVINO does not run: publish with --backend {PYTHON}"
            )
        return PYTHON_BACKEND, ""
    if own_library().is_file():
        return OWN_BACKEND, ""
    missing = f"Triton's backend for OpenVINO is not built ({own_library()}; `make install` builds it)"
    if wanted == OPENVINO:
        raise RepositoryError(f"{missing}: build it, or publish with --backend {PYTHON}")
    return PYTHON_BACKEND, f"{missing}: the python backend serves instead, with the same answers but slower"


def _runs_in_openvino(card: Card) -> bool:
    """Whether what runs on any CPU, the chosen engine or else its fallback in float32, runs in OpenVINO."""
    needed = [card.engine] if card.engine.precision == "f32" else card.engines
    return all(engine.kind == OPENVINO for engine in needed)


def engine_text(card: Card) -> str:
    """What our own backend reads of a card: its hash, and each engine that OpenVINO runs, with the file's hash.

    Raises:
        CardError: an engine's file is not what the card says, or is not proven.
    """
    lines = ["format 1", f"card_sha256 {sha256_of(card.folder / CARD_FILE)}", f"largest_tile {max(card.tile_sizes)}"]
    for engine in card.engines:
        if engine.kind != OPENVINO:
            continue
        path = card.verify_engine(engine)
        proven = native(engine.precision, engine.proof.instructions if engine.proof else ())
        pixel_bytes = bytes_per_pixel(EngineChoice(engine.kind, engine.precision), card.model.get("base_filters"))
        words = ("native" if proven else "emulated", str(pixel_bytes), sha256_of(path), engine.file)
        lines.append(" ".join(("engine", engine.precision, *words)))
    return "\n".join(lines) + "\n"
