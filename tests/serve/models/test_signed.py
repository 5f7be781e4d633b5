"""Signatures are asked for when a model is published, when the server starts and when it loads."""

from __future__ import annotations

import py_compile
import shutil
from collections.abc import Callable
from pathlib import Path

import minisign
import pytest

from serve.models.config import ModelSettings, RepositoryError
from serve.models.publish import publish
from serve.models.signing import Signing
from serve.repository import main
from serve.server.control import ModelControl
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings, admin_key
from serve.server.state import load_state
from serve.triton import main as triton
from unet.card.signature import SignatureError, Signer, verify

Change = Callable[[Path], object]
MakeSettings = Callable[..., ServerSettings]


def flip_last_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A secret and a public key, as `minisign -G` writes them."""
    pair = minisign.KeyPair.generate()
    secret, public = tmp_path / "ours.key", tmp_path / "ours.pub"
    secret.write_bytes(bytes(pair.secret_key))
    public.write_bytes(bytes(pair.public_key))
    return secret, public


@pytest.fixture
def artefacts(tiny_artefacts: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """Signed artefacts."""
    folder = Path(shutil.copytree(tiny_artefacts, tmp_path / "artefacts"))
    Signer(keys[0]).sign(folder)
    return folder


@pytest.fixture
def signed(artefacts: Path, tmp_path: Path, keys: tuple[Path, Path]) -> Path:
    """A repository with two signed versions."""
    for batch in (4, 8):
        settings = ModelSettings(max_batch_size=batch)
        publish(artefacts, tmp_path / "models", settings, signing=Signing(keys[1], Signer(keys[0])))
    return tmp_path / "models"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: None, ""),
        (lambda folder: flip_last_byte(folder / "model.fp16.onnx"), "model.fp16.onnx is not the file that was signed"),
        (lambda folder: flip_last_byte(folder / "card.json"), "card.json is not the file that was signed"),
        (lambda folder: (folder / "SHA256SUMS.minisig").write_text("x"), "SHA256SUMS.minisig is no signature"),
        (lambda folder: (folder / "SHA256SUMS.minisig").unlink(), "SHA256SUMS.minisig cannot be read"),
    ],
)
def test_only_artefacts_that_the_key_signed_are_published(
    change: Change,
    words: str,
    artefacts: Path,
    keys: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(artefacts)
    models = tmp_path / "models"
    flags = ["--artefacts", artefacts, "--model_repository", models, "--require_signature", keys[1], "--sign", keys[0]]
    assert main([str(flag) for flag in flags]) == (2 if words else 0)
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == bool(words)
    assert (models / "unet" / "1").exists() != bool(words)
    if not words:
        verify(models / "unet" / "1", keys[1])


def test_going_back_keeps_the_signature_and_asks_for_it(
    signed: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--rollback", "--model_repository", str(signed), "--require_signature", str(keys[1])]
    assert main(flags) == 0
    verify(signed / "unet" / "3", keys[1])
    flip_last_byte(signed / "unet" / "2" / "config.pbtxt")
    assert main(flags) == 2
    assert "unet/2/config.pbtxt is not the file that was signed" in capsys.readouterr().err
    assert not (signed / "unet" / "4").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: flip_last_byte(model / "2/model.fp16.onnx"), r"2/model\.fp16\.onnx is not the file that was"),
        (lambda model: flip_last_byte(model / "1/card.json"), r"1/card\.json is not the file that was signed"),
        (lambda model: flip_last_byte(model / "2/model.py"), r"2/model\.py is not the file that was signed"),
        (
            lambda model: flip_last_byte(model / "2/unet/files/naming.py"),
            r"2/unet/files/naming\.py is not the file that was signed",
        ),
        (lambda model: flip_last_byte(model / "2/config.pbtxt"), r"2/config\.pbtxt is not the file that was signed"),
        (lambda model: (model / "2/unet/files.so").touch(), r"2/unet/files\.so was not signed"),
        (lambda model: (model / "2/SHA256SUMS.minisig").unlink(), r"2/SHA256SUMS\.minisig cannot be read"),
        (lambda model: shutil.copy(model / "1/config.pbtxt", model), r"unet/config\.pbtxt is not what the signed"),
        (
            lambda model: (model / "config.pbtxt").write_text(
                (model / "config.pbtxt").read_text().replace("max_batch_size: 8", "max_batch_size: 9")
            ),
            r"unet/config\.pbtxt is not what the signed versions say: publish the model again",
        ),
    ],
)
def test_the_server_does_not_start_with_what_was_not_signed(
    change: Change, words: str, signed: Path, keys: tuple[Path, Path], settings_for: MakeSettings
) -> None:
    change(signed / "unet")
    with pytest.raises(SignatureError, match=words):
        TritonServer(settings_for(signed, require_signature=keys[1])).start()


def test_a_foreign_key_is_one_sentence_of_the_command(
    signed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = tmp_path / "foreign.pub"
    foreign.write_bytes(bytes(minisign.KeyPair.generate().public_key))
    flags = ["--model_repository", str(signed), "--state_dir", str(tmp_path / "state")]
    assert triton(["start", *flags, "--require_signature", str(foreign)]) == 2
    said = capsys.readouterr().err
    assert "/SHA256SUMS.minisig is no signature of SHA256SUMS by the key" in said
    assert said.count("\n") == 1


def test_bytecode_is_not_run_in_the_place_of_signed_code(
    signed: Path, keys: tuple[Path, Path], settings_for: MakeSettings
) -> None:
    version, mark = signed / "unet" / "2", signed.parent / "ran"
    # Unchecked bytecode, as `py_compile` writes it: Python takes it whatever stands in the module.
    for module in ("model", "unet/files/naming"):
        source = signed.parent / "planted.py"
        source.write_text(f"open({str(mark)!r}, 'w').close()\n")
        place = (version / module).parent / "__pycache__" / f"{Path(module).name}.cpython-311.pyc"
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), str(place), invalidation_mode=mode)
    with TritonServer(settings_for(signed, require_signature=keys[1])) as server:
        assert server.pid
    assert not mark.exists()


def test_a_running_server_loads_signed_versions_only(
    signed: Path, artefacts: Path, keys: tuple[Path, Path], settings_for: MakeSettings
) -> None:
    settings = settings_for(signed, require_signature=keys[1], model_control="explicit")
    with TritonServer(settings):
        state = load_state(settings.state_dir)
        assert state is not None
        control = ModelControl(state, admin_key(settings)[1])
        with pytest.raises(RepositoryError, match=r"3/SHA256SUMS\.minisig cannot be read"):
            publish(artefacts, signed, ModelSettings(), load=control.load)
        assert not (signed / "unet" / "3").exists()
        publish(artefacts, signed, ModelSettings(), load=control.load, signing=Signing(keys[1], Signer(keys[0])))
        control.canary("unet", 60)
        flip_last_byte(signed / "unet" / "3" / "model.py")
        with pytest.raises(TritonError, match=r"unet is not loaded: .*3/model\.py is not the file that was signed"):
            control.reload("unet")
        control.canary("unet", 60)
