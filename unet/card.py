"""The card: what each artefact is made of, by which command, how exact it is, and whether it is still that file.

``card.json`` lies beside the artefacts. Whatever loads an artefact asks the card first:
``Card.load(folder).verify(name)``.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from unet.errors import UnetError
from unet.files import sha256_of, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

CARD_FILE = "card.json"
FORMAT = 1
SHORT_HASH = 12

_REBUILD = "write it again with python export/main.py"


class CardError(UnetError):
    """A card that cannot be read, or an artefact that is not what its card says."""


@dataclass(frozen=True)
class Artefact:
    """One line of the card.

    ``file`` is relative to the card's folder, with forward slashes. ``facts`` holds whatever else is known.
    """

    file: str
    sha256: str
    parent: str | None
    parent_sha256: str | None
    command: str
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Engine:
    """What runs the network on the machine that exported it.

    Attributes:
        kind: "openvino" or "onnxruntime".
        precision: "bf16", "f32" or "int8", the arithmetic's number format.
        file: the artefact's file that the engine loads, relative to the card's folder.
        img_per_s: tiles of the first tile size per second, one at a time.
    """

    kind: str
    precision: str
    file: str
    img_per_s: float


class Card:
    """The history of the artefacts in one folder."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.artefacts: dict[str, Artefact] = {}
        self.model: dict[str, Any] = {}
        self.tile_sizes: tuple[int, ...] = ()
        self.parity: list[dict[str, Any]] = []
        self._engine: Engine | None = None

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Card:
        """Read ``folder``'s card.

        Raises:
            CardError: there is none, or it is not a card of this version.
        """
        card = cls(folder)
        path = card.folder / CARD_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise CardError(f"{path} does not exist: name a folder of artefacts that export/main.py wrote") from error
        except (OSError, ValueError) as error:
            raise CardError(f"{path} cannot be read as a card ({error}): {_REBUILD}") from error
        if not isinstance(values, dict) or "artefacts" not in values:
            raise CardError(f"{path} is JSON but not a card of artefacts: {_REBUILD}")
        if values.get("format") != FORMAT:
            raise CardError(f"{path} has format {values.get('format')}, this version reads {FORMAT}: {_REBUILD}")
        try:
            card._fill(values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CardError(f"{path} lacks or misnames an entry ({error}): {_REBUILD}") from error
        return card

    def _fill(self, values: Mapping[str, Any]) -> None:
        for name, entry in values["artefacts"].items():
            self.artefacts[name] = Artefact(**{f.name: entry[f.name] for f in fields(Artefact)})
        self.model = dict(values["model"])
        self.tile_sizes = tuple(int(size) for size in values["tile_sizes"])
        self.parity = list(values["parity"])
        if values["engine"] is not None:
            self._engine = Engine(**{f.name: values["engine"][f.name] for f in fields(Engine)})

    def as_dict(self) -> dict[str, Any]:
        """What ``save`` writes."""
        return {
            "format": FORMAT,
            "model": self.model,
            "tile_sizes": list(self.tile_sizes),
            "engine": None if self._engine is None else asdict(self._engine),
            "artefacts": {name: asdict(artefact) for name, artefact in self.artefacts.items()},
            "parity": self.parity,
        }

    def save(self) -> Path:
        """Write the card into its folder, whole or not at all; returns its path."""
        path = self.folder / CARD_FILE
        write_json(path, self.as_dict())
        return path

    @property
    def has_engine(self) -> bool:
        """Whether an engine for a CPU was chosen."""
        return self._engine is not None

    @property
    def engine(self) -> Engine:
        """The engine that the exporter chose.

        Raises:
            CardError: the card is that of artefacts for another machine.
        """
        if self._engine is None:
            path = self.folder / CARD_FILE
            raise CardError(f"{path} names no engine for a CPU: run python export/main.py with --target cpu")
        return self._engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._engine = engine

    def record(
        self,
        name: str,
        path: str | os.PathLike[str],
        parent: str | None,
        command: str,
        *,
        versions: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> Artefact:
        """Enter a file or folder that lies inside the card's folder, with its hash and its parent's.

        Args:
            name: the artefact's name on the card.
            path: where it lies.
            parent: the name of the artefact that it was made from, entered before; None for the first.
            command: the command that makes it.
            versions: of the tools that made it.
            **facts: anything else that JSON can hold.
        """
        artefact = Artefact(
            file=Path(path).relative_to(self.folder).as_posix(),
            sha256=sha256_of(path),
            parent=parent,
            parent_sha256=None if parent is None else self._entry(parent).sha256,
            command=command,
            versions=dict(versions or {}),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            facts=facts,
        )
        self.artefacts[name] = artefact
        return artefact

    def verify(self, name: str) -> Path:
        """Check one artefact's file against the card, and the card's chain to its ancestors; returns its path.

        The parent's file need not be there: a published version carries only what it serves.

        Raises:
            CardError: the card does not know ``name``, the file is missing or is not the one that was recorded,
                or it was made from another parent than the card's.
        """
        artefact = self._entry(name)
        path = self._path(artefact)
        if not path.exists():
            raise CardError(f"{path} is missing although {self.folder / CARD_FILE} lists it: {_REBUILD}")
        found = sha256_of(path)
        if found != artefact.sha256:
            raise CardError(
                f"{path} is not the file that its card describes: its SHA-256 begins with {found[:SHORT_HASH]}, "
                f"the card's with {artefact.sha256[:SHORT_HASH]}; {_REBUILD}"
            )
        self._check_chain(name)
        return path

    def verify_engine(self) -> Path:
        """``verify`` the artefact that the chosen engine loads; returns its path."""
        for name, artefact in self.artefacts.items():
            if artefact.file == self.engine.file:
                return self.verify(name)
        raise CardError(f"{self.folder / CARD_FILE} names the engine file {self.engine.file} but does not list it")

    def _check_chain(self, name: str) -> None:
        seen = [name]
        while (parent := self.artefacts[seen[-1]].parent) is not None:
            child, entry = self.artefacts[seen[-1]], self._entry(parent)
            if parent in seen or child.parent_sha256 != entry.sha256:
                recorded = (child.parent_sha256 or "nothing")[:SHORT_HASH]
                raise CardError(
                    f"{self.folder / CARD_FILE}: {child.file} was made from another {parent}: its SHA-256 began with "
                    f"{recorded}, the listed one's begins with {entry.sha256[:SHORT_HASH]}; {_REBUILD}"
                )
            seen.append(parent)

    def _entry(self, name: str) -> Artefact:
        if name not in self.artefacts:
            known = ", ".join(self.artefacts) or "nothing"
            raise CardError(f"{self.folder / CARD_FILE} does not list {name}; it lists {known}")
        return self.artefacts[name]

    def _path(self, artefact: Artefact) -> Path:
        relative = PurePosixPath(artefact.file)
        if relative.is_absolute() or ".." in relative.parts:
            raise CardError(f"{self.folder / CARD_FILE} lists {artefact.file}, which lies outside its folder")
        return self.folder / relative
