from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tools.tissues import FIRST, SECOND, Look, tissue, write_real, write_tissue
from unet import phantom
from unet.phantom import synthetic_stack
from unet.volume import open_volume


def test_the_first_tissue_is_the_synthetic_stack() -> None:
    for found, expected in zip(tissue(2, FIRST, 3, side=96), synthetic_stack(2, 96, 3)):
        np.testing.assert_array_equal(found, expected)


def test_a_look_changes_intensities_about_their_mean_and_not_the_labels() -> None:
    plain, truth = tissue(1, FIRST, 3, side=128)
    seen, same = tissue(1, Look(contrast=0.5, brightness=20), 3, side=128)
    np.testing.assert_array_equal(same, truth)
    np.testing.assert_allclose(seen, (plain - plain.mean()) * 0.5 + plain.mean() + 20, atol=0.51)
    noisy, _ = tissue(1, Look(contrast=0.5, brightness=20, noise=10), 3, side=128)
    assert np.std(noisy.astype(float) - seen) == pytest.approx(10, rel=0.05)
    blurred, _ = tissue(1, Look(blur_px=2), 3, side=128)
    assert np.abs(np.diff(blurred.astype(float))).mean() < 0.5 * np.abs(np.diff(plain.astype(float))).mean()


def test_at_half_the_scale_there_is_four_times_as_much_to_see() -> None:
    small, truth = tissue(1, Look(scale=0.5), 3, side=128)
    whole, labels = synthetic_stack(1, 256, 3)
    assert small.shape == truth.shape == (1, 128, 128)
    means = whole[0].reshape(128, 2, 128, 2).mean((1, 3))
    np.testing.assert_allclose(small[0], means, atol=0.51)
    np.testing.assert_array_equal(truth[0], labels[0, ::2, ::2])


def test_what_is_scored_is_what_training_holds_out(tmp_path: Path) -> None:
    folder = write_tissue(tmp_path / "tissue", 5, SECOND, 1)
    with open_volume(folder / "train-volume.tif") as all_slices, open_volume(folder / "test-volume.tif") as held_out:
        np.testing.assert_array_equal(np.stack(list(held_out)), np.stack(list(all_slices))[4:])


def test_of_real_slices_those_that_training_would_hold_out_are_scored(tmp_path: Path) -> None:
    assert write_real(tmp_path / "none", tmp_path) is None
    assert phantom.main(["--out", str(tmp_path / "data"), "--slices", "7", "--size", "96"]) == 0
    folder = write_real(tmp_path / "real", tmp_path / "data")
    assert folder is not None
    for kind in ("volume", "labels"):
        with (
            open_volume(tmp_path / "data" / f"train-{kind}.tif") as given,
            open_volume(folder / f"test-{kind}.tif") as kept,
        ):
            np.testing.assert_array_equal(np.stack(list(kept)), np.stack(list(given))[5:])


@pytest.mark.slow
def test_the_command_trains_three_networks_and_scores_them(tmp_path: Path, project_root: Path) -> None:
    steps = ("--first_steps", "4", "--steps", "4", "--tuning_steps", "2")
    line = [
        sys.executable,
        "-m",
        "tools.tissues",
        "--out",
        str(tmp_path / "tissues"),
        "--data_dir",
        str(tmp_path),
        *steps,
    ]
    done = subprocess.run(line, cwd=project_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "tissues" / "tissues.json").read_text())
    assert len(rows) == 5
    assert [row for row in done.stdout.splitlines() if row.startswith("| second tissue: 2 steps")]
