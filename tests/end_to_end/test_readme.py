"""Every command of README.md, in its order, in one checkout: the main job from end to end on the real Triton."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tifffile

# What makes each command quick; the commands stay the README's own.
QUICKER = {
    "unet.phantom --out data": "unet.phantom --out data --slices 30 --size 96",
    "--minutes 20": "--minutes 20 --base_filters 4 --tile_size 236 --max_steps 30",
    # In 8-bit integers single pixels differ by more than what is compared below.
    "--out artefacts --data_dir data": "--out artefacts --data_dir data --tile_sizes 572 --no_int8",
    "serve/benchmark.py": "serve/benchmark.py --batch_sizes 1 --seconds 1 --rounds 1 --slices 2",
    "make demo": "make demo DEMO_FLAGS=--quick",
}


def readme_commands(text: str) -> list[str]:
    """The commands of the README's shell blocks, continued lines joined, and its Python blocks as one command each."""
    commands = []
    for language, block in re.findall(r"```(sh|python)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            commands.append(shlex.join(["python", "-c", block]))
        else:
            commands += block.replace("\\\n", "").splitlines()
    return commands


@pytest.fixture(scope="module")
def transcript(
    checkout: Path, project_root: Path, user_environment: dict[str, str]
) -> dict[str, subprocess.CompletedProcess[str]]:
    """What each command said."""
    said = {}
    try:
        for command in readme_commands((project_root / "README.md").read_text(encoding="utf-8")):
            line = command
            for slow, quick in QUICKER.items():
                line = line.replace(slow, quick)
            done = subprocess.run(
                ["bash", "-c", line], cwd=checkout, env=user_environment, capture_output=True, text=True, check=False
            )
            # On a busy machine no figure is to be believed, and then there is nothing to simulate from.
            busy = command.startswith("python serve/scaling.py") and "on an idle machine" in done.stderr
            assert done.returncode == 0 or busy, f"$ {line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            said[command] = done
    finally:
        subprocess.run(["make", "stop"], cwd=checkout, env=user_environment, capture_output=True, check=False)
    return said


def output_of(transcript: dict[str, subprocess.CompletedProcess[str]], start: str) -> str:
    return next(done.stdout for command, done in transcript.items() if command.startswith(start))


pytestmark = pytest.mark.timeout(900)


def test_the_quick_settings_still_fit_the_readme(project_root: Path) -> None:
    commands = "\n".join(readme_commands((project_root / "README.md").read_text(encoding="utf-8")))
    for slow in QUICKER:
        assert re.sub(r"\s+", " ", slow) in re.sub(r"[ \t]+", " ", commands)


def test_the_demo_says_where_everything_is(
    transcript: dict[str, subprocess.CompletedProcess[str]], checkout: Path
) -> None:
    said = output_of(transcript, "make demo")
    assert "does not exist: taking a synthetic stack instead" in said
    for name in ("result/saved_model", "artefacts", "test-volume-overlay.png", "benchmark", "logs"):
        assert f"demo/{name}" in said
        assert (checkout / "demo" / name).exists()
    assert "2 ranks x 1 windows" in said
    assert "V_rand thin" in said
    assert "validation Dice" in said
    # The same batch size by our client, by perf_analyzer, and the reference's figures.
    assert re.search(r"\| +572 \| +1 \| +1 \|.*\| +62\.81 \| +34\.27 \|", said)
    record = json.loads((checkout / "demo" / "benchmark" / "benchmark.json").read_text(encoding="utf-8"))
    assert {(row["level"], row["batch_size"]) for row in record["rows"]} >= {("engine", 1), ("shared memory", 1)}
    assert record["stack"]["client_slices_per_s"] > 0


def test_the_trainer_scores_the_fold(transcript: dict[str, subprocess.CompletedProcess[str]]) -> None:
    said = output_of(transcript, "python train/main.py")
    wanted = r"6 held-out slices of 96 x 96, at the threshold [\d.]+ that the validation slices chose: V_rand [\d.]+"
    assert re.search(wanted, said)


def test_the_served_probability_is_the_trained_networks(
    transcript: dict[str, subprocess.CompletedProcess[str]], checkout: Path
) -> None:
    """Through ONNX, FP16, bf16, Triton, tiles and a file: what TensorFlow gives for the whole slice."""
    import tensorflow as tf

    assert "30 slices of 96 x 96" in output_of(transcript, "python serve/client.py data/test-volume.tif")
    served = tifffile.imread(checkout / "data" / "test-volume-probability.tif")
    images = tifffile.imread(checkout / "data" / "test-volume.tif")
    assert served.shape == images.shape
    assert served.dtype == np.float32
    network = tf.saved_model.load(str(checkout / "result" / "saved_model")).signatures["serving_default"]
    # 284 gives 100, the smallest valid output that covers 96.
    padded = np.pad(images[:3], ((0, 0), (92, 96), (92, 96)), mode="reflect")[..., np.newaxis]
    expected = network(image=tf.constant(padded))["probability"].numpy()[:, :96, :96, 0]
    np.testing.assert_allclose(served[:3], expected, atol=0.03)
    # A network that answers the same everywhere would agree with itself too.
    assert served.std() > 0.01


def test_the_library_writes_what_the_client_writes(
    transcript: dict[str, subprocess.CompletedProcess[str]], checkout: Path
) -> None:
    said = output_of(transcript, "python -c")
    assert "data/test-volume-probability.tif" in said
    assert "slices/s" in said
    probability = tifffile.imread(checkout / "data" / "test-volume-probability.tif")
    mask = tifffile.imread(checkout / "data" / "test-volume-mask.tif")
    trained = json.loads((checkout / "result" / "config.json").read_text(encoding="utf-8"))["trained"]
    np.testing.assert_array_equal(mask > 0, probability > np.float32(trained["threshold"]))


def test_the_report_of_the_demo_is_there(
    transcript: dict[str, subprocess.CompletedProcess[str]], checkout: Path
) -> None:
    assert "report.html: 6 slices" in output_of(transcript, "make report")
    assert (checkout / "report.html").stat().st_size > 100_000


def test_the_report_of_the_run_is_there(
    transcript: dict[str, subprocess.CompletedProcess[str]], checkout: Path
) -> None:
    assert "result/report.html: 6 slices" in output_of(transcript, "python -m train.report")
    assert "train-volume.tif[29]" in (checkout / "result" / "report.html").read_text(encoding="utf-8")


def test_the_readme_is_short(project_root: Path) -> None:
    assert len((project_root / "README.md").read_text(encoding="utf-8").split()) < 900


def test_the_service_is_gone_at_the_end(
    transcript: dict[str, subprocess.CompletedProcess[str]], checkout: Path
) -> None:
    assert output_of(transcript, "make stop").strip() == "stopped"
    status = ["python", "serve/triton.py", "status"]
    assert subprocess.run(status, cwd=checkout, capture_output=True, check=False).returncode == 1
