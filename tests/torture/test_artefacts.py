"""Damaged artefacts are refused by name, or mean the same: a sample here, ten thousand by `make torture`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.errors import ExportError
from export.steps.training_run import TrainingRun
from serve.models.config import ModelSettings
from serve.models.errors import RepositoryError
from serve.models.publish import publish, rollback
from serve.repository import main
from serve.server.check import check_repository
from serve.server.install import TritonError
from tests.cards import rewrite_record
from tests.torture.artefacts import VERDICTS, attack
from unet.card import Card, CardError


def test_damaged_artefacts_are_refused_by_name_or_mean_the_same() -> None:
    found = attack(200, campaign=3)
    assert found.findings == {}
    total = {verdict: sum(counts[verdict] for counts in found.verdicts.values()) for verdict in VERDICTS}
    assert sum(total.values()) == 200
    assert total["refused"] > 150


def test_a_card_with_another_number_is_refused(tiny_artefacts: Path, tmp_path: Path) -> None:
    text = (tiny_artefacts / "card.json").read_text()
    (tmp_path / "card.json").write_text(text.replace('"img_per_s": 1.0', '"img_per_s": 9.0', 1))
    with pytest.raises(CardError, match=r"card\.json is not as it was written"):
        Card.load(tmp_path)
    # Spaces and the order of entries say nothing.
    (tmp_path / "card.json").write_text(json.dumps(dict(reversed(json.loads(text).items()))))
    assert Card.load(tmp_path).tile_sizes == (204, 252)


def test_a_configuration_with_another_number_is_not_served(tiny_artefacts: Path, tmp_path: Path) -> None:
    publish(tiny_artefacts, tmp_path, ModelSettings(max_batch_size=8))
    config = tmp_path / "unet" / "config.pbtxt"
    text = config.read_text()
    config.write_text(text.replace("max_batch_size: 8", "max_batch_size: 9"))
    with pytest.raises(TritonError, match=r"unet/config\.pbtxt is not as it was published"):
        check_repository(tmp_path)
    config.write_text(f"# a remark\n{text}")
    assert check_repository(tmp_path) == ["unet"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace("max_batch_size: 8", "max_batch_size: 9"), "is not as it was published"),
        (lambda text: text[:-9], "is not a configuration of Triton's"),
    ],
)
def test_a_version_with_another_configuration_does_not_come_back(
    tiny_artefacts: Path, tmp_path: Path, change: object, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    for _ in range(2):
        publish(tiny_artefacts, tmp_path, ModelSettings(max_batch_size=8))
    config = tmp_path / "unet" / "1" / "config.pbtxt"
    config.write_text(change(config.read_text()))
    with pytest.raises(RepositoryError, match=words):
        rollback(tmp_path, version=1)
    assert main(["--rollback", "--version", "1", "--model_repository", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {config} is not")


@pytest.mark.parametrize(
    "entries",
    [{"trained": 1.5}, {"trained": {"threshold_from": "training"}}, {"held_out": {"a.tif": 3}}, {"versions": 7}],
)
def test_a_training_record_of_another_kind_is_a_sentence(entries: dict[str, object], tmp_path: Path) -> None:
    rewrite_record(tmp_path, **entries)
    with pytest.raises(ExportError, match=r"config\.json lacks or misnames an entry"):
        TrainingRun.read(tmp_path)
