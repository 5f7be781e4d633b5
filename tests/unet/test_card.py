from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cards import sealed
from unet.card import CARD_FILE, Card, CardError
from unet.card.records import Engine, Proof
from unet.files import sha256_of


def proof_of(path: Path, device: str = "cpu") -> Proof:
    return Proof(
        sha256_of(path), device, ("avx2", "vnni"), ({"step": path.name, "max_difference": 1e-7},), None, {"a": 1}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved folder -> a file -> another file, and an engine that loads the last."""
    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model" / "weights").write_bytes(b"1234")
    (tmp_path / "model.onnx").write_bytes(b"single")
    (tmp_path / "model.fp16.onnx").write_bytes(b"half")
    card = Card(tmp_path)
    card.record(
        "saved_model", tmp_path / "saved_model", None, "python train/main.py", versions={"tensorflow": "2.15.1"}
    )
    single, half = tmp_path / "model.onnx", tmp_path / "model.fp16.onnx"
    card.record("onnx", single, "saved_model", "python -m export.steps.to_onnx", proof=proof_of(single), opset=17)
    card.record("onnx_fp16", half, "onnx", "python -m export.steps.half_precision", proof=proof_of(half))
    card.model = {"base_filters": 16, "parameters": 1_940_834}
    card.tile_sizes = (572, 700)
    card.engine = Engine("openvino", "bf16", "model.fp16.onnx", 12.5, proof_of(half))
    card.fallback = Engine("openvino", "f32", "model.fp16.onnx", 6.5, proof_of(half))
    card.save()
    return tmp_path


def test_a_loaded_card_is_the_saved_one(folder: Path) -> None:
    card = Card.load(folder)
    assert json.loads(json.dumps(card.as_dict())) == json.loads((folder / CARD_FILE).read_text())
    assert card.tile_sizes == (572, 700)
    half = folder / "model.fp16.onnx"
    assert card.engine == Engine("openvino", "bf16", "model.fp16.onnx", 12.5, proof_of(half))
    assert card.fallback == Engine("openvino", "f32", "model.fp16.onnx", 6.5, proof_of(half))
    assert card.engines == [card.engine, card.fallback]
    assert card.artefacts["onnx"].proof == proof_of(folder / "model.onnx")
    assert card.artefacts["onnx"].facts == {"opset": 17}
    assert card.artefacts["onnx"].parent_sha256 == card.artefacts["saved_model"].sha256
    assert card.artefacts["saved_model"].versions == {"tensorflow": "2.15.1"}
    assert card.verify_engine() == half
    assert card.verify_engine(card.fallback) == half
    assert card.verify_proven("onnx_fp16", "cpu") == half


def test_another_file_is_refused_with_both_hashes(folder: Path) -> None:
    recorded = sha256_of(folder / "model.onnx")
    (folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(CardError) as caught:
        Card.load(folder).verify("onnx")
    for part in (str(folder / "model.onnx"), recorded[:12], sha256_of(folder / "model.onnx")[:12]):
        assert part in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30)
@given(position=st.integers(0, 3), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(folder: Path, position: int, bit: int) -> None:
    path = folder / "saved_model" / "weights"
    content = bytearray(b"1234")
    content[position] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CardError, match="not the file"):
        Card.load(folder).verify("saved_model")
    path.write_bytes(b"1234")
    Card.load(folder).verify("saved_model")


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "model.fp16.onnx").unlink()
    with pytest.raises(CardError, match=r"model\.fp16\.onnx is missing"):
        Card.load(folder).verify_engine()


def test_a_child_of_another_parent_is_refused(folder: Path) -> None:
    card = Card.load(folder)
    (folder / "model.onnx").write_bytes(b"trained anew")
    path = folder / "model.onnx"
    card.record("onnx", path, "saved_model", "python -m export.steps.to_onnx", proof=proof_of(path))
    card.verify("onnx")
    uses: tuple[Callable[[], object], ...] = (lambda: card.verify("onnx_fp16"), card.save, card.verify_engine)
    for use in uses:
        with pytest.raises(CardError, match=r"model\.fp16\.onnx was made from another onnx: its SHA-256 began"):
            use()


def test_a_changed_parent_is_refused_when_the_child_is_used_or_entered(folder: Path) -> None:
    card = Card.load(folder)
    (folder / "model.onnx").write_bytes(b"another export landed")
    for use in (card.save, card.verify_engine, lambda: card.verify_proven("onnx_fp16", "cpu")):
        with pytest.raises(CardError, match=r"model\.onnx is not the file that its card describes"):
            use()


def test_a_card_whose_chain_is_a_ring_is_refused(folder: Path) -> None:
    values = json.loads((folder / CARD_FILE).read_text())
    values["artefacts"]["saved_model"]["parent"] = "onnx_fp16"
    values["artefacts"]["saved_model"]["parent_sha256"] = values["artefacts"]["onnx_fp16"]["sha256"]
    (folder / CARD_FILE).write_text(sealed(values))
    with pytest.raises(CardError, match="was made from"):
        Card.load(folder).verify("onnx")


def test_a_published_copy_without_the_parents_verifies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    published = tmp_path_factory.mktemp("version")
    for name in (CARD_FILE, "model.fp16.onnx"):
        shutil.copy(folder / name, published)
    assert Card.load(published).verify_engine() == published / "model.fp16.onnx"


def test_a_card_without_engine_says_so(folder: Path) -> None:
    values = json.loads((folder / CARD_FILE).read_text())
    values["engine"] = None
    (folder / CARD_FILE).write_text(sealed(values))
    card = Card.load(folder)
    assert not card.has_engine
    with pytest.raises(CardError, match="--target cpu"):
        _ = card.engine


def test_an_engine_file_that_is_not_listed_is_refused(folder: Path) -> None:
    card = Card.load(folder)
    card.engine = Engine("openvino", "f32", "other.onnx", 1.0, proof_of(folder / "model.onnx"))
    with pytest.raises(CardError, match=r"other\.onnx but does not list it"):
        card.verify_engine()


def test_an_unknown_artefact_is_named_beside_the_known(folder: Path) -> None:
    with pytest.raises(CardError, match="does not list plan; it lists saved_model, onnx, onnx_fp16"):
        Card.load(folder).verify("plan")
    with pytest.raises(CardError, match="does not list plan"):
        Card.load(folder).record("x", folder / "model.onnx", "plan", "", proof=proof_of(folder / "model.onnx"))


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "a/../../b"])
def test_a_file_outside_the_folder_is_refused(folder: Path, file: str) -> None:
    values = json.loads((folder / CARD_FILE).read_text())
    values["artefacts"]["onnx"]["file"] = file
    (folder / CARD_FILE).write_text(sealed(values))
    with pytest.raises(CardError, match="outside"):
        Card.load(folder).verify("onnx")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read as a card"),
        ("[]", "not a card"),
        ("{}", "not a card"),
        ('{"artefacts": {}, "format": 99}', "format 99, this version reads 3"),
        ('{"artefacts": {}, "format": 3}', "lacks or misnames an entry"),
        ('{"artefacts": {"onnx": {"file": "x"}}, "format": 3}', "lacks or misnames an entry"),
        ('{"artefacts": [1], "format": 3}', "lacks or misnames an entry"),
        ("\xff", "cannot be read as a card"),
    ],
)
def test_what_is_no_card_gets_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    if "format" in content:
        content = sealed(json.loads(content))
    (tmp_path / CARD_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(CardError, match=sentence):
        Card.load(tmp_path)


def test_a_folder_without_card_is_named(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"card\.json does not exist"):
        Card.load(tmp_path)


def test_nothing_is_entered_or_served_without_a_proof_of_its_own(folder: Path) -> None:
    card = Card.load(folder)
    half = folder / "model.fp16.onnx"
    for proof in (None, proof_of(folder / "model.onnx")):
        with pytest.raises(CardError, match="has no proof that it computes the network"):
            card.record("onnx_fp16", half, "onnx", "", proof=proof)
        card.engine = Engine("openvino", "f32", "model.fp16.onnx", 1.0, proof)
        with pytest.raises(CardError, match="has no proof that it computes the network"):
            card.verify_engine()
    with pytest.raises(CardError, match="has no proof"):
        card.verify_proven("saved_model", "cpu")


def test_a_proof_is_of_one_kind_of_device(folder: Path) -> None:
    card = Card.load(folder)
    path = folder / "model.plan"
    path.write_bytes(b"a plan")
    card.record("plan", path, "onnx_fp16", "", proof=proof_of(path, "gpu 7.0"))
    assert card.verify_proven("plan", "gpu 7.0") == path
    with pytest.raises(CardError, match=r"was proven on gpu 7\.0, and is to be served on gpu 8\.6"):
        card.verify_proven("plan", "gpu 8.6")
    with pytest.raises(CardError, match=r"was proven on cpu, and is to be served on gpu 7\.0"):
        card.verify_proven("onnx_fp16", "gpu 7.0")
