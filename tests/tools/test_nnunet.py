from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np

from tools.nnunet import write_cases
from train.input.split import Data
from train.input.store import Slice


def test_slices_are_written_as_nnunet_wants_them(tmp_path: Path) -> None:
    """It wants classes from 0, which is not the membrane, and knows what is not annotated by a class of its own."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 40, 30), np.uint8)
    labels = rng.integers(0, 2, (3, 40, 30), np.uint8)
    labels[2, :5] = 255
    slices = [Slice(str(page), image, label) for page, (image, label) in enumerate(zip(images, labels))]
    held_out = write_cases(tmp_path / "raw", Data(training=slices[1:], held_out=slices[:1]))
    assert held_out == ["slice_0002"]
    for number, page in enumerate((1, 2, 0)):
        image = cv2.imread(str(tmp_path / "raw" / "imagesTr" / f"slice_{number:04}_0000.png"), cv2.IMREAD_UNCHANGED)
        classes = cv2.imread(str(tmp_path / "raw" / "labelsTr" / f"slice_{number:04}.png"), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(image, images[page])
        np.testing.assert_array_equal(classes == 1, labels[page] == 0)
        np.testing.assert_array_equal(classes == 0, labels[page] == 1)
        np.testing.assert_array_equal(classes == 2, labels[page] == 255)
    dataset = json.loads((tmp_path / "raw" / "dataset.json").read_text())
    assert dataset["labels"] == {"background": 0, "membrane": 1, "ignore": 2}
    assert dataset["numTraining"] == 3
