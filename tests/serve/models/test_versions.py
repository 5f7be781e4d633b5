"""Publishers that were killed, and what there is to go back to afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from serve.models.config import CONFIG_FILE, ModelSettings
from serve.models.publish import publish, rollback
from serve.models.versions import versions_in
from tests.serve.conftest import artefacts_dividing_by
from unet.card import CARD_FILE


@pytest.fixture
def artefacts(tmp_path: Path) -> list[Path]:
    return [artefacts_dividing_by(tmp_path / f"by-{divisor}", divisor) for divisor in (255, 510)]


@pytest.fixture
def model(artefacts: list[Path], tmp_path: Path) -> Path:
    """Two versions, of two networks."""
    for folder in artefacts:
        publish(folder, tmp_path / "models", ModelSettings())
    return tmp_path / "models" / "unet"


def card_of(version: Path) -> bytes:
    return (version / CARD_FILE).read_bytes()


def test_a_version_whose_publisher_was_killed_before_the_configuration_does_not_count(
    artefacts: list[Path], model: Path
) -> None:
    shutil.copytree(model / "1", model / "3")  # as when going back to it was interrupted
    assert rollback(model.parent, keep=2).version == 3
    assert versions_in(model) == [2, 3]
    assert card_of(model / "3") == card_of(artefacts[0])
    shutil.copytree(model / "2", model / "4")
    assert publish(artefacts[1], model.parent, ModelSettings(), keep=2).version == 4
    assert versions_in(model) == [3, 4]
    assert b'"card_sha256_4"' in (model / CONFIG_FILE).read_bytes()


def test_a_first_version_whose_publisher_was_killed_does_not_count(artefacts: list[Path], tmp_path: Path) -> None:
    model = publish(artefacts[0], tmp_path / "models", ModelSettings()).path.parent
    (model / CONFIG_FILE).unlink()
    assert publish(artefacts[1], tmp_path / "models", ModelSettings()).version == 1
    assert card_of(model / "1") == card_of(artefacts[1])


def test_versions_without_any_configuration_stay(artefacts: list[Path], model: Path) -> None:
    (model / CONFIG_FILE).unlink()
    assert publish(artefacts[0], model.parent, ModelSettings()).version == 3
    assert versions_in(model) == [1, 2, 3]


def test_a_publish_that_is_repeated_leaves_what_there_is_to_go_back_to(artefacts: list[Path], model: Path) -> None:
    for _ in range(3):
        publish(artefacts[1], model.parent, ModelSettings(), keep=2)
    assert versions_in(model) == [1, 4, 5]
    went_back = rollback(model.parent, keep=2)
    assert card_of(went_back.path) == card_of(artefacts[0])
    publish(artefacts[0], model.parent, ModelSettings(), keep=1)
    assert len(versions_in(model)) == 1
