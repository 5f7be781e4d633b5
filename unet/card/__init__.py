"""The card: what each artefact is made of, by which command, how exact it is, and whether it is still that file.

``card.json`` lies beside the artefacts. Whatever loads an artefact asks the card first:
``Card.load(folder).verify(name)``.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from unet.card.records import CPU, Artefact, Engine, Proof
from unet.errors import UnetError
from unet.files import read_json, sha256_of, write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

CARD_FILE = "card.json"
FORMAT = 3
SEAL = "seal"
SHORT_HASH = 12

_REBUILD = "write it again with python export/main.py"


class CardError(UnetError):
    """A card that cannot be read, or an artefact that is not what its card says."""


class Card:
    """The history of the artefacts in one folder.

    Attributes:
        folder: that holds them.
        artefacts: by name, see ``unet.names``.
        model: what is known of the network and of the machine that exported it.
        tile_sizes: input sizes to serve.
        fallback: an engine in float32, for a CPU that the chosen engine's proof does not hold on.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.artefacts: dict[str, Artefact] = {}
        self.model: dict[str, Any] = {}
        self.tile_sizes: tuple[int, ...] = ()
        self.fallback: Engine | None = None
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
            values = read_json(path)
        except FileNotFoundError as error:
            raise CardError(f"{path} does not exist: name a folder of artefacts that export/main.py wrote") from error
        except (OSError, ValueError) as error:
            raise CardError(f"{path} cannot be read as a card ({error}): {_REBUILD}") from error
        if not isinstance(values, dict) or "artefacts" not in values:
            raise CardError(f"{path} is JSON but not a card of artefacts: {_REBUILD}")
        if values.get("format") != FORMAT:
            raise CardError(f"{path} has format {values.get('format')!r:.20}, this version reads {FORMAT}: {_REBUILD}")
        if values.get(SEAL) != seal_of(values):
            raise CardError(f"{path} is not as it was written: an entry is another one, or is missing; {_REBUILD}")
        try:
            card._fill(values)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise CardError(f"{path} lacks or misnames an entry ({error}): {_REBUILD}") from error
        return card

    def _fill(self, values: Mapping[str, Any]) -> None:
        for name, entry in values["artefacts"].items():
            known = {one.name: entry[one.name] for one in fields(Artefact)}
            if not (isinstance(known["file"], str) and isinstance(known["sha256"], str)):
                raise TypeError(f"{name} has no file with a SHA-256")
            self.artefacts[name] = Artefact(**{**known, "proof": Proof.read(entry["proof"])})
        self.model = dict(values["model"])
        self.tile_sizes = tuple(int(size) for size in values["tile_sizes"])
        self._engine, self.fallback = (Engine.read(values[name]) for name in ("engine", "fallback"))

    def as_dict(self) -> dict[str, Any]:
        """What ``save`` writes."""
        values = {
            "format": FORMAT,
            "model": self.model,
            "tile_sizes": list(self.tile_sizes),
            "engine": None if self._engine is None else asdict(self._engine),
            "fallback": None if self.fallback is None else asdict(self.fallback),
            "artefacts": {name: asdict(artefact) for name, artefact in self.artefacts.items()},
        }
        return {**values, SEAL: seal_of(values)}

    def save(self) -> Path:
        """Write the card into its folder, whole or not at all; returns its path.

        Raises:
            CardError: an artefact is not the recorded one, or was made from another parent than the listed one.
        """
        for name in self.artefacts:
            self.verify(name)
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

    @property
    def engines(self) -> list[Engine]:
        """The chosen engine and the fallback, if they are there and each once."""
        found = [one for one in (self._engine, self.fallback) if one is not None]
        return found[:1] if found[1:] == found[:1] else found

    def record(
        self,
        name: str,
        path: str | os.PathLike[str],
        parent: str | None,
        command: str,
        *,
        proof: Proof | None = None,
        versions: Mapping[str, str] | None = None,
        **facts: Any,
    ) -> Artefact:
        """Enter a file or folder that lies inside the card's folder, with its hash and its parent's.

        Args:
            name: the artefact's name on the card.
            path: where it lies.
            parent: the name of the artefact that it was made from, entered before; None for the first.
            command: the command that makes it.
            proof: of what was made from a parent.
            versions: of the tools that made it.
            **facts: anything else that JSON can hold.

        Raises:
            CardError: it has a parent and no proof, or a proof of another file.
        """
        sha256 = sha256_of(path)
        if parent is not None:
            self._check_proof(Path(path), sha256, proof)
        artefact = Artefact(
            file=Path(path).relative_to(self.folder).as_posix(),
            sha256=sha256,
            parent=parent,
            parent_sha256=None if parent is None else self._entry(parent).sha256,
            command=command,
            versions=dict(versions or {}),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            facts=facts,
            proof=proof,
        )
        self.artefacts[name] = artefact
        return artefact

    def verify(self, name: str) -> Path:
        """Check one artefact's file and those of its ancestors against the card; returns its path.

        An ancestor's file need not be there: a published version carries only what it serves.

        Raises:
            CardError: the card does not know ``name``, the file is missing, a file is not the one that was recorded,
                or an artefact was made from another parent than the card's.
        """
        path = self._path(self._entry(name))
        if not path.exists():
            raise CardError(f"{path} is missing although {self.folder / CARD_FILE} lists it: {_REBUILD}")
        for one in self._chain(name):
            self._check_file(one)
        return path

    def verify_proven(self, name: str, device: str) -> Path:
        """``verify`` an artefact that is to be served, and its proof; returns its path.

        Args:
            name: the artefact.
            device: that will run it: "cpu" or `gpu_device`.

        Raises:
            CardError: as ``verify``; or the file has no proof of its own, or one of another kind of device.
        """
        path = self.verify(name)
        artefact = self._entry(name)
        self._check_proof(path, artefact.sha256, artefact.proof, device)
        return path

    def _check_proof(self, path: Path, sha256: str, proof: Proof | None, device: str | None = None) -> None:
        if proof is None or proof.sha256 != sha256:
            raise CardError(f"{path} has no proof that it computes the network: {_REBUILD}")
        if device is not None and proof.device != device:
            raise CardError(
                f"{path} was proven on {proof.device}, and is to be served on {device}: build and prove it there"
            )

    def _check_file(self, name: str) -> None:
        artefact = self._entry(name)
        path = self._path(artefact)
        if not path.exists():
            return
        found = sha256_of(path)
        if found != artefact.sha256:
            raise CardError(
                f"{path} is not the file that its card describes: its SHA-256 begins with {found[:SHORT_HASH]}, "
                f"the card's with {artefact.sha256[:SHORT_HASH]}; {_REBUILD}"
            )

    def verify_engine(self, engine: Engine | None = None) -> Path:
        """``verify`` the artefact that an engine loads, and the engine's proof; returns the artefact's path.

        Args:
            engine: by default the chosen one.

        Raises:
            CardError: as ``verify_proven``, or the card does not list the file.
        """
        engine = engine or self.engine
        for name, artefact in self.artefacts.items():
            if artefact.file == engine.file:
                path = self.verify(name)
                self._check_proof(path, artefact.sha256, engine.proof, CPU)
                return path
        raise CardError(f"{self.folder / CARD_FILE} names the engine file {engine.file} but does not list it")

    def _chain(self, name: str) -> list[str]:
        """An artefact and its ancestors, each made from the one after it."""
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
        return seen

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


def seal_of(values: Mapping[str, Any]) -> str:
    """The SHA-256 of all entries of a card or a record but the seal itself, whatever their order and their spacing."""
    entries = {name: value for name, value in values.items() if name != SEAL}
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
