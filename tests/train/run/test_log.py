from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from train.run.log import RunLog, read_log


def test_lines_for_programs_and_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, active=True)
    log.event("PARAMETER", "begins", seed=3)
    log.event(20, "step 20", loss=0.5)
    log.event("SUMMARY", "ends", steps=20)
    assert capsys.readouterr().out == "begins\nstep 20\nends\n"
    assert list(read_log(tmp_path)) == [("PARAMETER", {"seed": 3}), (20, {"loss": 0.5}), ([], {"steps": 20})]
    assert all(line.startswith("DLLL {") for line in (tmp_path / "log.json").read_text().splitlines())


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path / "result", active=False)
    log.event(1, "step 1", loss=0.5)
    log.picture(1, "slice", np.zeros((4, 4, 3), np.uint8))
    log.rewind(0)
    log.close()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "result").exists()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path, active=True)
    log.event("PARAMETER", "begins", seed=3)
    for step in (10, 20, 30):
        log.event(step, f"step {step}", loss=1 / step)
    with (tmp_path / "log.json").open("a") as stream:
        stream.write('DLLL {"timestamp": "17')  # a power cut's last words
    log.rewind(20)
    assert [step for step, _ in read_log(tmp_path)] == ["PARAMETER", 10, 20]


def test_tensorboard_shows_the_same_scalars_and_pictures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    log = RunLog(tmp_path, active=True)
    log.event(10, "step 10", loss=0.5, img_per_s=2.0)
    log.event(20, "step 20", loss=0.25)
    log.picture(20, "slice", pixels)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    board.Reload()
    assert set(board.Tags()["tensors"]) == {"loss", "img_per_s", "slice"}
    losses = [(event.step, float(tf.make_ndarray(event.tensor_proto))) for event in board.Tensors("loss")]
    assert losses == [(10, 0.5), (20, 0.25)]
    (picture,) = board.Tensors("slice")
    assert picture.step == 20
    assert [int(text) for text in tf.make_ndarray(picture.tensor_proto)[:2]] == [7, 5]
