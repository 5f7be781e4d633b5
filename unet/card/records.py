"""The lines of a card: an artefact, the engine that runs one, and the proof of each."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

CPU = "cpu"


def gpu_device(compute_capability: str) -> str:
    """What `Proof.device` says of a GPU, as in "gpu 7.0"."""
    return f"gpu {compute_capability}"


@dataclass(frozen=True)
class Proof:
    """What shows that a file computes the network that it was made from; only the exporter's gate makes one.

    Attributes:
        sha256: of the file that was run.
        device: what ran it: "cpu", or "gpu" with its compute capability, as in "gpu 7.0".
        instructions: that the CPU computed with, see ``unet.machine.instruction_sets``.
        comparisons: with the artefacts before it on the same tiles, each at its worst.
        scores: of held-out slices; None where there were none with labels.
        facts: what else was measured.
    """

    sha256: str
    device: str
    instructions: tuple[str, ...] = ()
    comparisons: tuple[dict[str, Any], ...] = ()
    scores: dict[str, Any] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> Proof | None:
        """Out of JSON, where lists stand for tuples; None stays None."""
        if values is None:
            return None
        known = {one.name: values[one.name] for one in fields(cls)}
        lists = {name: tuple(known[name]) for name in ("instructions", "comparisons")}
        return cls(**{**known, **lists})


@dataclass(frozen=True)
class Artefact:
    """One line of the card.

    ``file`` is relative to the card's folder, with forward slashes. ``facts`` holds whatever else is known. ``proof``
    is None for the SavedModel alone, which all others are measured against.
    """

    file: str
    sha256: str
    parent: str | None
    parent_sha256: str | None
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    proof: Proof | None = None


@dataclass(frozen=True)
class Engine:
    """What runs the network on a CPU, as it did on the machine that exported it.

    Attributes:
        kind: "openvino" or "onnxruntime".
        precision: "bf16", "f32" or "int8", the arithmetic's number format.
        file: the artefact's file that the engine loads, relative to the card's folder.
        img_per_s: tiles of the first tile size per second, one at a time.
        proof: that this library computes the network from this file.
    """

    kind: str
    precision: str
    file: str
    img_per_s: float
    proof: Proof | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any] | None) -> Engine | None:
        """Out of JSON; None stays None."""
        if values is None:
            return None
        known = {one.name: values[one.name] for one in fields(cls)}
        return cls(**{**known, "proof": Proof.read(values["proof"])})
