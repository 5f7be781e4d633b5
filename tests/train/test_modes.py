"""The modes by the command: what they write, and what they read from the run instead of from flags."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tests.cards import rewrite_record
from train.evaluation import make_predictor
from train.input.store import load_stack
from train.model.network import build_unet
from train.run.checkpoints import Checkpoints
from train.run.folder import Run
from train.scoring import tally
from unet.volume import MASKS

Main = Callable[..., "subprocess.CompletedProcess[str]"]


def test_a_run_is_scored_on_what_it_held_out_at_the_threshold_that_validation_chose(
    trained: Path, phantom_dir: Path
) -> None:
    record = json.loads((trained / "eval" / "scores-96x96.json").read_text())
    assert (record["slices"], record["held_out"]) == (1, True)
    assert record["threshold"] == Run(trained).threshold
    model = build_unet(2)
    Run(trained).load_trained(model)
    slices = load_stack((phantom_dir / "train-volume.tif", phantom_dir / "train-labels.tif"), MASKS, 0.0)
    held_out = tally(make_predictor(model), [slices[4]]).at(record["threshold"])
    assert record["v_rand_at_threshold"] == pytest.approx(held_out["v_rand"])
    assert record["dice"] == pytest.approx(held_out["dice"])
    # The threshold is the best one of the validation slice, and not of the slice that is scored.
    assert tally(make_predictor(model), [slices[2]]).best_threshold == record["threshold"]


def test_the_saved_model_has_no_code_of_keras(trained: Path) -> None:
    """Which may hold Python code that a reader would run."""
    assert (trained / "saved_model" / "saved_model.pb").exists()
    assert not (trained / "saved_model" / "keras_metadata.pb").exists()


def test_the_saved_model_has_the_best_weights(trained: Path) -> None:
    import tensorflow as tf

    best = build_unet(2)
    step = Run(trained).best(best).restore(partial=True)
    for saved, weight in zip(tf.saved_model.load(str(trained / "saved_model")).model.variables, best.get_weights()):
        np.testing.assert_array_equal(saved.numpy(), weight)
    assert json.loads((trained / "config.json").read_text())["trained"]["weights_step"] == step


def test_evaluate_and_predict_need_no_more_than_the_folder(
    trained: Path, phantom_dir: Path, tmp_path: Path, main: Main
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "eval")
    # A threshold that no slice would choose for itself here: the scores are taken at the run's.
    (manifest,) = run.glob("best/step-*/manifest.json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "threshold": 0.9}))
    # The data has moved, and the flags say nothing of the network or the fold.
    data = Path(shutil.copytree(phantom_dir, tmp_path / "moved"))
    for mode in ("evaluate", "predict"):
        done = main(f"--exec_mode={mode}", f"--model_dir={run}", f"--data_dir={data}")
        assert done.returncode == 0, done.stderr
    before = json.loads((trained / "eval" / "scores-96x96.json").read_text())
    after = json.loads((run / "eval" / "scores-96x96.json").read_text())
    assert after.keys() == before.keys()
    for name in ("slices", "held_out", "v_rand", "v_info", "best_v_rand", "best_v_info"):
        assert after[name] == pytest.approx(before[name]), name
    assert after["threshold"] == 0.9
    assert after["v_rand_at_threshold"] == after["v_rand"][9]
    assert after["v_info_at_threshold"] == after["v_info"][9]
    assert before["threshold"] < 0.9
    probability = tifffile.imread(run / "eval" / "test-probability.tif")
    assert probability.shape == (2, 96, 96)
    assert 0 <= probability.min() < probability.max() <= 1


def test_the_mean_of_networks_is_the_mean_of_their_answers(
    trained: Path, phantom_dir: Path, tmp_path: Path, main: Main
) -> None:
    one = Path(shutil.copytree(trained, tmp_path / "one"))
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    shutil.rmtree(other / "best")
    larger = build_unet(3, seed=5)
    Checkpoints(other / "checkpoints", model=larger).save(10_000)
    record = json.loads((other / "config.json").read_text())
    rewrite_record(other, settings={**record["settings"], "base_filters": 3})
    line = (f"--model_dir={one}", f"--data_dir={phantom_dir}", f"--also={other}")
    answers = []
    for flags in (line[:2], line, (f"--model_dir={other}", line[1])):
        done = main("--exec_mode=predict", *flags)
        assert done.returncode == 0, done.stderr
        answers.append(tifffile.imread((other if flags[0] != line[0] else one) / "eval" / "test-probability.tif"))
    assert np.abs(answers[0] - answers[2]).max() > 0.05
    np.testing.assert_allclose(answers[1], (answers[0] + answers[2]) / 2, atol=1e-6)
    done = main("--exec_mode=evaluate", *line)
    assert done.returncode == 0, done.stderr
    scores = json.loads((one / "eval" / "scores-96x96.json").read_text())
    assert (scores["networks"], scores["held_out"], scores["slices"]) == (2, True, 1)
    # The record of a run does not keep what one command was about.
    assert json.loads((one / "config.json").read_text())["settings"].get("also", "") == ""
    # What the other network was trained on is not held out.
    held_out = {"train-volume.tif": [0]}
    rewrite_record(other, held_out=held_out)
    done = main("--exec_mode=evaluate", *line)
    assert done.returncode == 2
    assert "scores of their mean would be of slices that one of them has seen" in done.stderr
    # So it is with stacks of few slices, of which rows are held out.
    for run, rows in ((one, [0, 40]), (other, [40, 80])):
        rewrite_record(run, held_out={}, held_out_rows={"train-volume.tif": rows})
    done = main("--exec_mode=evaluate", *line)
    assert done.returncode == 2
    assert "rows 40 to 80" in done.stderr


def test_a_folder_without_a_run_has_no_network_to_add(
    trained: Path, phantom_dir: Path, tmp_path: Path, main: Main
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    done = main("--exec_mode=predict", f"--model_dir={run}", f"--data_dir={phantom_dir}", f"--also={tmp_path / 'none'}")
    assert done.returncode == 2
    assert f"{tmp_path / 'none'} holds no training run: name the --model_dir of one with --also" in done.stderr
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    record = json.loads((other / "config.json").read_text())
    rewrite_record(other, settings={**record["settings"], "window": "slice"})
    done = main("--exec_mode=predict", f"--model_dir={run}", f"--data_dir={phantom_dir}", f"--also={other}")
    assert done.returncode == 2
    assert "was trained with --window 'slice'" in done.stderr


def test_a_diverged_network_predicts_nothing(trained: Path, phantom_dir: Path, tmp_path: Path, main: Main) -> None:
    """Its weights are finite, so nothing was refused before; its answers are not."""
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(run / "best")
    shutil.rmtree(run / "eval")
    model = build_unet(2)
    for layer in model.layers:
        if layer.weights:
            layer.set_weights([np.full_like(array, 60_000) for array in layer.get_weights()])
    Checkpoints(run / "checkpoints", model=model).save(9)
    for mode in ("predict", "evaluate"):
        done = main(f"--exec_mode={mode}", f"--model_dir={run}", f"--data_dir={phantom_dir}")
        assert done.returncode == 2
        assert "of a slice with values that are not numbers, for its weights have diverged" in done.stderr
    assert not list(run.glob("eval/*.tif"))


def test_without_validation_the_last_weights_are_taken_and_the_scores_say_so(
    phantom_dir: Path, tmp_path: Path, main: Main
) -> None:
    flags = ("--base_filters=2", "--tile_size=188", "--max_steps=2", "--validation_share=0")
    done = main("--exec_mode=train_and_evaluate", f"--data_dir={phantom_dir}", f"--model_dir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    threshold = json.loads((tmp_path / "config.json").read_text())["trained"]["threshold"]
    assert f"has the newest weights, of step 2; threshold {threshold}, chosen on training slices" in done.stdout
    assert f"5 training slices of 96 x 96, at the threshold {threshold} that training slices chose" in done.stdout
    assert json.loads((tmp_path / "eval" / "scores-96x96.json").read_text())["held_out"] is False
