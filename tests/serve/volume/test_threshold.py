"""Masks are cut where the network's own training cut, of the very version that answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet.card import Card

IMAGES = np.random.default_rng(7).integers(0, 256, (2, 60, 80), np.uint8)
# What the test's network answers.
PROBABILITY = (IMAGES.astype(np.float16) * np.float16(1 / 255)).astype(np.float32)


def artefacts_with(threshold: float | None, source: Path, folder: Path) -> Path:
    """The same artefacts, whose training chose a threshold."""
    shutil.copytree(source, folder)
    card = Card.load(folder)
    if threshold is not None:
        card.model.update(threshold=threshold, threshold_from="validation")
    card.save()
    return folder


def test_each_version_is_cut_at_its_own_threshold(
    tiny_artefacts: Path,
    settings_for: Callable[..., ServerSettings],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for number, threshold in ((1, None), (2, 0.7)):
        artefacts = artefacts_with(threshold, tiny_artefacts, tmp_path / f"artefacts-{number}")
        publish(artefacts, tmp_path / "models", ModelSettings())
    source = tmp_path / "v.tif"
    tifffile.imwrite(source, IMAGES, photometric="minisblack")
    with TritonServer(settings_for(tmp_path / "models")) as server:
        url = server.settings.grpc_url
        words = [str(source), "--url", url, "--output", "mask", "--output", "labels", "--json"]
        # Triton has one configuration for both versions. The training of the first chose no threshold.
        for more, wanted in ((["--model_version", "1"], 0.5), ([], 0.7), (["--threshold", "0.4"], 0.4)):
            assert main([*words, *more, "--overwrite"]) == 0
            assert json.loads(capsys.readouterr().out)["threshold"] == wanted
            mask = tifffile.imread(tmp_path / "v-mask.tif")
            np.testing.assert_array_equal(mask, np.where(np.float32(wanted) < PROBABILITY, 255, 0))
        # What was cut at the network's own threshold is done; what was cut at another is not.
        assert main([*words, "--resume"]) == 2
        assert "v-mask.tif exists already" in capsys.readouterr().err
        assert main([*words[:-1], "--overwrite"]) == 0
        assert ", threshold 0.7, " in capsys.readouterr().out
        assert main([*words, "--resume"]) == 0
        assert "is done already" in capsys.readouterr().err
    with tifffile.TiffFile(tmp_path / "v-mask.tif") as tiff:
        made_by = tiff.pages.first.software
    assert " threshold 0.7; intensity window as they are; threshold the network's; views 1" in made_by
