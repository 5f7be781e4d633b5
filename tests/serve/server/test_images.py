"""The images that `make images` builds, run as their users run them: `make test-images`."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tifffile

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.state import answers_ready
from unet.processes import child, free_ports
from unet.volume import PROBABILITY_LIMITS, StackReader

pytestmark = pytest.mark.images

BUILDAH = ("buildah", "--storage-driver", "vfs")
LARGEST_SERVE_MB = 700


def buildah(*words: str) -> str:
    done = subprocess.run([*BUILDAH, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def container_of(image: str) -> Iterator[str]:
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed (Debian: apt-get install buildah)")
    name = buildah("from", f"localhost/{image}:cpu")
    yield name
    buildah("rm", name)


@pytest.fixture(scope="module")
def serving() -> Iterator[str]:
    """A working container of the serving image."""
    with container_of("unet-serve") as name:
        yield name


@pytest.fixture(scope="module")
def training() -> Iterator[str]:
    """A working container of the training image."""
    with container_of("unet-train") as name:
        yield name


def run_line(container: str, *options: str) -> list[str]:
    # As Docker does, and buildah does not, the machine resolves its own name: Gloo crashes where it cannot.
    return [
        *BUILDAH,
        "run",
        "--isolation",
        "chroot",
        "--hostname",
        "localhost",
        "--user",
        "1000:1000",
        *options,
        container,
        "--",
    ]


def inside(container: str, *words: str) -> str:
    done = subprocess.run([*run_line(container), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_serving_image_is_small_and_holds_no_compiler(serving: str) -> None:
    listed = buildah("images", "--format", "{{.Size}}", "unet-serve:cpu").split()
    assert listed[1] == "MB"
    assert float(listed[0]) <= LARGEST_SERVE_MB
    for program in ("gcc", "g++", "cc", "make", "pip"):
        done = subprocess.run(
            [*run_line(serving), "sh", "-c", f"command -v {program}"], capture_output=True, check=False
        )
        assert done.returncode != 0, program


def test_the_serving_image_segments_a_stack_and_ends_in_order(
    serving: str, tiny_artefacts: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    publish(tiny_artefacts, models, ModelSettings(max_batch_size=8))
    for path in (models, *models.rglob("*")):
        path.chmod(path.stat().st_mode | 0o055)
    http, grpc, metrics = free_ports(3)
    line = run_line(serving, "--volume", f"{models}:/models:ro")
    flags = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    images = np.random.default_rng(0).integers(0, 256, (3, 80, 90), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", images, photometric="minisblack")
    with child([*line, "serve-unet", *flags], log=tmp_path / "log") as process:
        while not answers_ready("127.0.0.1", http, ["unet"], "triton", key=""):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                raise AssertionError((tmp_path / "log").read_text())
        client = [sys.executable, "serve/client.py", str(tmp_path / "stack.tif"), "--url", f"127.0.0.1:{grpc}"]
        # The client is not part of the image: a user's own sends the tiles.
        root = Path(__file__).resolve().parents[3]
        done = subprocess.run(client, cwd=root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    with StackReader(tmp_path / "stack-probability.tif", PROBABILITY_LIMITS) as reader:
        np.testing.assert_allclose(np.stack(list(reader)), images / 255, atol=1e-3)


def test_two_ranks_train_in_the_training_image(training: str) -> None:
    script = (
        "set -e; cd /tmp; python -m unet.phantom --out data --slices 5 --size 96;"
        " horovodrun -np 2 --gloo python /workspace/train/main.py --exec_mode train --data_dir data --model_dir result"
        " --base_filters 2 --tile_size 188 --max_steps 4; ls result/saved_model"
    )
    assert "saved_model.pb" in inside(training, "bash", "-c", script)


def test_ranks_meet_over_ssh_and_mpi_as_an_ordinary_user(training: str) -> None:
    """As in an MPIJob: sshd of the image's own configuration, reached by mpirun on the loopback interface."""
    program = "import horovod.tensorflow as hvd; hvd.init(); print('rank', hvd.rank(), 'of', hvd.size())"
    script = (
        "set -e; mkdir -p ~/.ssh; ssh-keygen -q -t rsa -N '' -f ~/.ssh/id_rsa;"
        " cp ~/.ssh/id_rsa.pub ~/.ssh/authorized_keys;"
        " /usr/sbin/sshd -f ~/.sshd_config; trap 'kill $(cat ~/sshd.pid)' EXIT;"
        " mpirun -np 2 -H localhost:1,127.0.0.1:1 --mca plm_rsh_args '-p 2222' --mca orte_keep_fqdn_hostnames 1"
        f' --bind-to none -x PATH -x PYTHONPATH --mca pml ob1 --mca btl tcp,self python -c "{program}"'
    )
    said = inside(training, "bash", "-c", script)
    assert "rank 0 of 2" in said
    assert "rank 1 of 2" in said
