from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tensorflow as tf

from train.errors import TrainError
from train.model.network import build_unet
from train.run.checkpoints import Checkpoints, naming_disk_faults
from train.run.folder import Run
from train.run.room import require_room
from unet.files import read_json


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, model=build_unet(2))
    for step in range(1, 6):
        checkpoints.save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latest.json",
        "step-00000003",
        "step-00000004",
        "step-00000005",
    ]


def test_a_save_that_was_cut_off_is_completed_by_whoever_locks_the_run(tmp_path: Path) -> None:
    checkpoints = Run(tmp_path).checkpoints(model=build_unet(2))
    for step in range(1, 4):
        checkpoints.save(step)
    former = (checkpoints.folder / "latest.json").read_bytes()
    oldest = checkpoints.names()[-1]
    shutil.copytree(checkpoints.folder / oldest, tmp_path / "kept")
    checkpoints.save(4)
    (checkpoints.folder / "latest.json").write_bytes(former)
    shutil.move(tmp_path / "kept", checkpoints.folder / oldest)
    with Run(tmp_path).locked():
        assert checkpoints.names() == ["step-00000004", "step-00000003", "step-00000002"]
        assert read_json(checkpoints.folder / "latest.json") == {"checkpoint": "step-00000004", "step": 4}


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    Checkpoints(tmp_path, model=build_unet(2)).save(1)
    with pytest.raises(TrainError, match="of another network"):
        Checkpoints(tmp_path, model=build_unet(4)).restore(partial=True)


def test_a_diverged_checkpoint_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a version that did not look at the weights left it."""
    model = build_unet(2)
    checkpoints = Checkpoints(tmp_path, model=model)
    checkpoints.save(1)
    model.get_layer("logits").bias.assign([float("nan"), 0.0])
    checkpoints.save(2)
    with caplog.at_level(logging.WARNING):
        assert checkpoints.restore(partial=True) == 1
    assert "step-00000002 has diverged (logits/bias:0 has values that are not numbers)" in caplog.text
    assert float(model.get_layer("logits").bias[0]) == 0.0


@pytest.mark.parametrize(
    "error",
    [
        tf.errors.ResourceExhaustedError(None, None, "x/variables: No space left on device"),
        OSError(errno.ENOSPC, "No space left on device"),
        tf.errors.UnknownError(None, None, "x/variables; No space left on device"),
    ],
)
def test_the_error_of_a_full_disk_names_the_file(error: Exception) -> None:
    with (
        pytest.raises(OSError, match=r"No space left on device: 'run/saved_model'"),
        naming_disk_faults(Path("run/saved_model")),
    ):
        raise error
    with pytest.raises(tf.errors.ResourceExhaustedError), naming_disk_faults(Path("x")):
        raise tf.errors.ResourceExhaustedError(None, None, "out of memory")


def test_a_disk_without_room_is_refused_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_unet(2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**19))
    with pytest.raises(TrainError, match=r"has 0 MiB free, but the run's checkpoints take 1 MiB"):
        require_room(Run(tmp_path / "run"), model.variables, model.variables * 2)


DISK = (
    # The disk is filled to the last byte once the first file of that name stands on it.
    'mount -t tmpfs -o size=8m tmpfs "$1" || exit 77; disk=$1 file=$2; shift 2; '
    '( until ls -d $disk/$file >/dev/null 2>&1; do sleep 0.02; done; cat /dev/zero > "$disk/filler" ) 2>/dev/null & '
    '"$@"; code=$?; rm -f "$disk/filler"; ls -A "$disk" "$disk/checkpoints" | grep "^\\." ; exit $code'
)


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, for a small disk of its own")
@pytest.mark.parametrize(
    ("file", "names"),
    [("checkpoints/step-00000010", "checkpoints|log.json|tensorboard"), (".saved_model.*", "saved_model")],
)
def test_a_full_disk_ends_in_one_sentence_that_names_the_file(
    tiny: Callable[..., object], line: Callable[..., list[str]], tmp_path: Path, file: str, names: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = line(tiny(model_dir=str(disk), max_steps=10 if file.startswith(".") else 2000, checkpoint_every=10))
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", DISK, "sh", str(disk), file, *words],
        capture_output=True, text=True, check=False, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine lets nobody mount a disk of their own")
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: the disk is full while writing {disk}/({names}).*: free some space.*\n", done.stderr)
    # Nothing half written is left; the checkpoints before stand.
    assert [name for name in done.stdout.split() if name.startswith(".")] == [".lock"]
    assert sys.executable in words
