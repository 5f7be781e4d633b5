"""A folder is the one that the owner of a key signed, or is refused in a sentence that names the file."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import minisign
import pytest

from unet.card.signature import SIGNATURE_FILE, SUMS_FILE, SignatureError, Signer, verify

Change = Callable[[Path], object]
TOOL = pytest.mark.skipif(shutil.which("minisign") is None, reason="the tool minisign is not installed")


def write_keys(folder: Path, name: str, password: str | None = None) -> tuple[Path, Path]:
    """A secret and a public key, as `minisign -G` writes them."""
    pair = minisign.KeyPair.generate()
    secret, public = folder / f"{name}.key", folder / f"{name}.pub"
    public.write_bytes(bytes(pair.public_key))
    if password is not None:
        pair.secret_key.encrypt(password)
    secret.write_bytes(bytes(pair.secret_key))
    return secret, public


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path, "ours")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "artefacts"
    (folder / "saved_model").mkdir(parents=True)
    for name in ("card.json", "model.onnx", "saved_model/weights"):
        (folder / name).write_text(f"content of {name}")
    return folder


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_signed_folder_is_accepted_and_signing_it_again_covers_what_came(
    folder: Path, keys: tuple[Path, Path]
) -> None:
    secret, public = keys
    Signer(secret).sign(folder)
    verify(folder, public)
    (folder / "model.plan").write_text("built later")
    Signer(secret).sign(folder)
    verify(folder, public)
    assert "  model.plan\n" in (folder / SUMS_FILE).read_text()
    # What Python leaves where the version is served is no part of it.
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "model.cpython-311.pyc").touch()
    verify(folder, public)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: flip_last_byte(folder / "model.onnx"), r"model\.onnx is not the file that was signed"),
        (lambda folder: flip_last_byte(folder / "card.json"), r"card\.json is not the file that was signed"),
        (lambda folder: flip_last_byte(folder / "saved_model/weights"), r"weights is not the file that was signed"),
        (lambda folder: (folder / "model.onnx").unlink(), r"model\.onnx is missing although .*SHA256SUMS lists it"),
        (lambda folder: (folder / "unet.so").touch(), r"unet\.so was not signed"),
        (lambda folder: (folder / "link").symlink_to("/etc"), r"link is a link"),
        (lambda folder: flip_last_byte(folder / SUMS_FILE), r"SHA256SUMS\.minisig is no signature of SHA256SUMS by"),
        (lambda folder: (folder / SUMS_FILE).unlink(), r"SHA256SUMS cannot be read \(No such file"),
        (lambda folder: (folder / SIGNATURE_FILE).unlink(), r"SHA256SUMS\.minisig cannot be read \(No such file"),
        (lambda folder: (folder / SIGNATURE_FILE).write_text("x"), r"SHA256SUMS\.minisig is no signature"),
    ],
)
def test_whatever_changed_is_refused_by_its_name(
    change: Change, words: str, folder: Path, keys: tuple[Path, Path]
) -> None:
    Signer(keys[0]).sign(folder)
    change(folder)
    with pytest.raises(SignatureError, match=words):
        verify(folder, keys[1])


def test_each_byte_of_the_signature_counts(folder: Path, keys: tuple[Path, Path]) -> None:
    Signer(keys[0]).sign(folder)
    path = folder / SIGNATURE_FILE
    comment, signature, trusted, over_both = path.read_bytes().splitlines()
    for line in (signature, over_both):
        content = base64.b64decode(line)
        for place in range(0, len(content), 7):
            changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
            lines = (comment, signature, trusted, over_both)
            path.write_bytes(b"\n".join(base64.b64encode(changed) if one is line else one for one in lines))
            with pytest.raises(SignatureError, match=r"SHA256SUMS\.minisig is no signature"):
                verify(folder, keys[1])
    path.write_bytes(b"\n".join((comment, signature, trusted + b"0", over_both)))
    with pytest.raises(SignatureError, match=r"SHA256SUMS\.minisig is no signature"):
        verify(folder, keys[1])


def test_another_key_is_refused(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    foreign, foreign_public = write_keys(tmp_path, "foreign")
    Signer(foreign).sign(folder)
    with pytest.raises(
        SignatureError, match=r"SHA256SUMS\.minisig is no signature of SHA256SUMS by the key .*ours\.pub"
    ):
        verify(folder, keys[1])
    # A key that merely bears the number of ours is another one too.
    ours, theirs = (base64.b64decode(path.read_bytes().splitlines()[1]) for path in (keys[1], foreign_public))
    mixed = tmp_path / "mixed.pub"
    mixed.write_bytes(b"untrusted comment: mixed\n" + base64.b64encode(theirs[:10] + ours[10:]))
    with pytest.raises(SignatureError, match=r"mixed\.pub \(signature verification failed\)"):
        verify(folder, mixed)


def test_keys_that_are_none_are_one_sentence(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    secret, public = keys
    for key in (public, folder / "card.json"):
        with pytest.raises(SignatureError, match="is not a secret key of minisign's"):
            Signer(key)
    with pytest.raises(SignatureError, match=r"nowhere cannot be read \(No such file"):
        Signer(tmp_path / "nowhere")
    Signer(secret).sign(folder)
    with pytest.raises(SignatureError, match="is not a public key of minisign's"):
        verify(folder, secret)


def test_a_key_with_a_password_takes_it_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret, public = write_keys(tmp_path, "locked", "open sesame")
    monkeypatch.setenv("MINISIGN_PASSWORD", "open sesame")
    Signer(secret).sign(folder)
    verify(folder, public)
    monkeypatch.setenv("MINISIGN_PASSWORD", "wrong")
    with pytest.raises(SignatureError, match=r"locked\.key cannot be opened \(wrong password"):
        Signer(secret)
    monkeypatch.delenv("MINISIGN_PASSWORD")
    with pytest.raises(SignatureError, match="no terminal to ask for it: set MINISIGN_PASSWORD"):
        Signer(secret)


def test_a_name_that_the_list_cannot_hold_is_refused(folder: Path, keys: tuple[Path, Path]) -> None:
    (folder / "two\nlines").touch()
    with pytest.raises(SignatureError, match="has a line end or a backslash in its name"):
        Signer(keys[0]).sign(folder)


def test_the_standard_tools_find_what_changed_and_what_was_added(
    folder: Path, keys: tuple[Path, Path], project_root: Path
) -> None:
    Signer(keys[0]).sign(folder)
    page = (project_root / "docs" / "serving.md").read_text(encoding="utf-8")
    sums, added = re.search(
        r"^minisign -Vm SHA256SUMS -p \S+ && (sha256sum .*)\n(diff .*)$", page, re.MULTILINE
    ).groups()  # type: ignore[union-attr]

    def outcome(line: str) -> int:
        return subprocess.run(["bash", "-c", line], cwd=folder, check=False, capture_output=True).returncode

    assert (outcome(sums), outcome(added)) == (0, 0)
    (folder / "saved_model" / "__pycache__").mkdir()
    (folder / "saved_model" / "__pycache__" / "added.pyc").touch()
    assert (outcome(sums), outcome(added)) == (0, 1)
    flip_last_byte(folder / "card.json")
    assert outcome(sums) == 1


@TOOL
def test_minisign_accepts_our_signature_and_we_accept_minisigns(folder: Path, tmp_path: Path) -> None:
    secret, public = tmp_path / "tool.key", tmp_path / "tool.pub"
    subprocess.run(["minisign", "-G", "-W", "-s", str(secret), "-p", str(public)], check=True, capture_output=True)
    Signer(secret).sign(folder)
    check = ["minisign", "-Vm", SUMS_FILE, "-p", str(public)]
    assert (
        b"Signature and comment signature verified"
        in subprocess.run(check, cwd=folder, check=True, capture_output=True).stdout
    )
    (folder / SIGNATURE_FILE).unlink()
    subprocess.run(["minisign", "-Sm", SUMS_FILE, "-s", str(secret)], cwd=folder, check=True, capture_output=True)
    verify(folder, public)
    flip_last_byte(folder / SUMS_FILE)
    assert subprocess.run(check, cwd=folder, capture_output=True, check=False).returncode != 0


def test_without_the_library_a_sentence_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "minisign.py").write_text("raise ImportError")
    code = "from pathlib import Path; from unet.card.signature import verify; verify(Path('.'), Path('.'))"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={"PYTHONPATH": str(tmp_path)}
    )
    assert (
        "signatures need py-minisign, which is not installed: pip install 'unet-medical-triton[sign]'" in ended.stderr
    )
