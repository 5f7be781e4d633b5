"""Signatures over a folder of artefacts or a published version, in minisign's format.

``SHA256SUMS`` lists every file of the folder, the card included; ``SHA256SUMS.minisig`` is the signature of that list.
So the standard tools check a folder too: ``minisign -Vm SHA256SUMS -p KEY.pub && sha256sum -c SHA256SUMS``. The
cryptography is that of py-minisign and the cryptography package, which the extra ``sign`` brings.
"""

from __future__ import annotations

import getpass
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet.errors import UnetError
from unet.files import atomic_file, sha256_of

if TYPE_CHECKING:
    from collections.abc import Iterator

SUMS_FILE = "SHA256SUMS"
SIGNATURE_FILE = f"{SUMS_FILE}.minisig"
PASSWORD_VARIABLE = "MINISIGN_PASSWORD"

# What Python leaves beside the modules of a served version. It is not signed: it is not copied, and removed before each
# load, since Python takes it in the place of the modules.
BYTECODE = "__pycache__"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n\\]+)")


class SignatureError(UnetError):
    """A key that cannot be used, or a folder that is not the one that was signed."""


class Signer:
    """A secret key, ready to sign.

    Args:
        key: file with a secret key as ``minisign -G`` writes it. The password of one that has a password is taken from
            the environment variable MINISIGN_PASSWORD, or asked for.

    Raises:
        SignatureError: it is no such key, the password is wrong, or the library is missing.
    """

    def __init__(self, key: Path) -> None:
        minisign = _library()
        try:
            self._key = minisign.SecretKey.from_bytes(_read(key, "the secret key that `minisign -G` wrote"))
        except minisign.Error as error:
            raise SignatureError(
                f"{key} is not a secret key of minisign's ({error}): make one with `minisign -G`"
            ) from (error)
        if self._key.is_encrypted():
            try:
                self._key.decrypt(_password(key))
            except minisign.Error as error:
                raise SignatureError(f"{key} cannot be opened ({error}): give the password that it has") from error

    def sign(self, folder: Path) -> None:
        """Write the list of a folder's files and its signature; one that was there is replaced.

        Raises:
            SignatureError: the folder holds a link, or a file whose name the list cannot hold.
        """
        text = "".join(f"{sha256_of(folder / name)}  {name}\n" for name in _files(folder))
        signature = bytes(self._key.sign(text.encode()))
        for name, content in ((SUMS_FILE, text.encode()), (SIGNATURE_FILE, signature)):
            with atomic_file(folder / name) as aside:
                aside.write_bytes(content)


def verify(folder: Path, public_key: Path) -> None:
    """Check that a folder holds what the owner of a key signed, and nothing else.

    Args:
        folder: of artefacts, or of a published version.
        public_key: file with the public key, as ``minisign -G`` writes it.

    Raises:
        SignatureError: naming the file that is missing, changed, added or signed by another key.
    """
    minisign = _library()
    try:
        key = minisign.PublicKey.from_bytes(_read(public_key, "the public key that `minisign -G` wrote"))
    except minisign.Error as error:
        raise SignatureError(f"{public_key} is not a public key of minisign's ({error})") from error
    path = folder / SIGNATURE_FILE
    signature_bytes = _read(path, "sign the folder with --sign where it is made")
    sums = _read(folder / SUMS_FILE, "sign the folder with --sign where it is made")
    try:
        key.verify(sums, minisign.Signature.from_bytes(signature_bytes))
    except minisign.Error as error:
        raise SignatureError(
            f"{path} is no signature of {SUMS_FILE} by the key {public_key} ({error}): do not use the folder, or name "
            "the key that signed it"
        ) from error
    _compare(folder, _listed(folder / SUMS_FILE, sums))


def _listed(path: Path, sums: bytes) -> dict[str, str]:
    lines = [_LINE.fullmatch(line) for line in sums.decode("utf-8", "replace").removesuffix("\n").split("\n")]
    if None in lines:
        raise SignatureError(f"{path} is signed but not a list of SHA-256 sums: sign the folder with --sign")
    return {line[2]: line[1] for line in lines if line is not None}


def _compare(folder: Path, listed: dict[str, str]) -> None:
    found = set(_files(folder))
    for name, sha256 in listed.items():
        if name not in found:
            raise SignatureError(f"{folder / name} is missing although {folder / SUMS_FILE} lists it")
        if sha256_of(folder / name) != sha256:
            raise SignatureError(f"{folder / name} is not the file that was signed: its SHA-256 is another")
    for name in sorted(found - listed.keys()):
        raise SignatureError(f"{folder / name} was not signed: remove it, or sign the folder again with --sign")


def _files(folder: Path) -> Iterator[str]:
    """Every file below a folder that a signature covers, by its relative name."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise SignatureError(f"{path} is a link, which a signature does not cover: put the file itself there")
        if path.is_dir() or BYTECODE in path.relative_to(folder).parts[:-1] or name in (SUMS_FILE, SIGNATURE_FILE):
            continue
        if not _LINE.fullmatch(f"{'0' * 64}  {name}"):
            raise SignatureError(f"{str(path)!r} has a line end or a backslash in its name: rename it")
        yield name


def _library() -> Any:
    try:
        import minisign
    except ImportError as error:
        raise SignatureError(
            "signatures need py-minisign, which is not installed: pip install 'unet-medical-triton[sign]'"
        ) from error
    return minisign


def _read(path: Path, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SignatureError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def _password(key: Path) -> str:
    if (given := os.environ.get(PASSWORD_VARIABLE)) is not None:
        return given
    if not sys.stdin.isatty():
        raise SignatureError(f"{key} has a password and there is no terminal to ask for it: set {PASSWORD_VARIABLE}")
    return getpass.getpass(f"password of {key}: ")
