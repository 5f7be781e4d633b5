"""The images that `make images` builds, run as their users run them: `make test-images`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
import yaml
import zarr

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.process import TritonServer
from serve.server.state import answers_ready
from tests.serve.server.conftest import ROOT
from tests.serve.volume.shards.harness import make_blocks
from tools.sbom import check, of_image
from unet.processes import child, free_ports
from unet.volume import PROBABILITY_LIMITS, StackReader

pytestmark = pytest.mark.images

BUILDAH = ("buildah", "--storage-driver", "vfs")
LARGEST_MB = {"unet-serve": 700, "unet-client": 700}
# As `docker run --read-only --tmpfs /tmp --volume SOURCE:TARGET` starts a container; buildah cannot.
READ_ONLY = """
root=$1 source=$2 target=$3
shift 3
mount --bind "$root" "$root" && mount -o remount,bind,ro "$root" || exit 1
mount --rbind /dev "$root/dev" && mount --rbind /sys "$root/sys" && mount -t proc proc "$root/proc" || exit 1
mount -t tmpfs tmpfs "$root/dev/shm" && mount -t tmpfs tmpfs "$root/tmp" || exit 1
mount --bind "$source" "$root$target" || exit 1
exec chroot --userspec=1000:1000 --groups=1000 "$root" env -i "$@"
"""
# What Python itself finds installed.
INSTALLED = (
    "from importlib.metadata import distributions as d; print(*(f'{x.name} {x.version}' for x in d()), sep='\\n')"
)


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


@pytest.fixture(scope="module")
def segmenting() -> Iterator[str]:
    """A working container of the client's image."""
    with container_of("unet-client") as name:
        yield name


def read_only(container: str, source: Path, target: str, words: Sequence[str] | None = None) -> list[str]:
    """The line that starts a container's own program, or ``words``, as user 1000 on a read-only root.

    ``source`` is at ``target`` there, which the image has.
    """
    settings = json.loads(buildah("inspect", container))["OCIv1"]["config"]
    program = words or [*settings.get("Entrypoint", []), *settings.get("Cmd", [])]
    return ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", buildah("mount", container), str(source), target,
            *settings["Env"], *program]  # fmt: skip


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


@pytest.mark.parametrize("image", LARGEST_MB)
def test_an_image_is_small_and_holds_no_compiler(image: str) -> None:
    with container_of(image) as container:
        size, unit = buildah("images", "--format", "{{.Size}}", f"{image}:cpu").split()
        assert unit == "MB"
        assert float(size) <= LARGEST_MB[image]
        for program in ("gcc", "g++", "cc", "make", "pip"):
            line = [*run_line(container), "sh", "-c", f"command -v {program}"]
            assert subprocess.run(line, capture_output=True, check=False).returncode != 0, program


def test_the_serving_image_segments_a_stack_and_ends_in_order(
    serving: str, tiny_artefacts: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    publish(tiny_artefacts, models, ModelSettings(max_batch_size=8))
    for path in (models, *models.rglob("*")):
        path.chmod(path.stat().st_mode | 0o055)
    http, grpc, metrics = free_ports(3)
    line = read_only(serving, models, "/models")
    flags = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    images = np.random.default_rng(0).integers(0, 256, (3, 80, 90), np.uint8)
    tifffile.imwrite(tmp_path / "stack.tif", images, photometric="minisblack")
    with child([*line, *flags], log=tmp_path / "log") as process:
        while not answers_ready("127.0.0.1", http, ["unet"], "triton", key=""):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                raise AssertionError((tmp_path / "log").read_text())
        client = [sys.executable, "serve/client.py", str(tmp_path / "stack.tif"), "--url", f"127.0.0.1:{grpc}"]
        # The client is not part of the image: a user's own sends the tiles.
        done = subprocess.run(client, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    with StackReader(tmp_path / "stack-probability.tif", PROBABILITY_LIMITS) as reader:
        np.testing.assert_allclose(np.stack(list(reader)), images / 255, atol=1e-3)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """A folder into which the user of the images may write."""
    tmp_path.chmod(0o777)
    return tmp_path


def test_the_clients_image_segments_a_stack(segmenting: str, triton_server: TritonServer, volumes: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 80, 90), np.uint8)
    tifffile.imwrite(volumes / "stack.tif", images, photometric="minisblack")
    # With process numbers and shared memory of its own, as another container has them.
    line = ["unshare", "--pid", "--fork", "--ipc", *read_only(segmenting, volumes, "/mnt")]
    words = ["/mnt/stack.tif", "--url", triton_server.settings.grpc_url]
    done = subprocess.run([*line, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("no memory is shared with ")
    assert done.stderr.count("\n") == 1
    written = volumes / "stack-probability.tif"
    np.testing.assert_array_equal(tifffile.imread(written), images.astype(np.float16) * np.float16(1 / 255))
    assert written.stat().st_uid == 1000


def test_the_jobs_command_segments_a_volume_in_the_clients_image(
    segmenting: str, triton_server: TritonServer, volumes: Path
) -> None:
    make_blocks(volumes / "cells.zarr", (3, 80, 90), (2, 80, 90))
    for path in (volumes / "cells.zarr").rglob("*"):
        os.chown(path, 1000, 1000)
    job = yaml.safe_load((ROOT / "docker" / "kubernetes" / "segment.yaml").read_text(encoding="utf-8"))
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "unet-client:cpu"
    here = {
        "/volumes/cells.zarr": "/mnt/cells.zarr",
        "cells-unet-serve:8001": triton_server.settings.grpc_url,
        "$(JOB_COMPLETION_INDEX)/100": "0/1",
    }
    assert here.keys() <= set(container["command"])
    line = read_only(segmenting, volumes, "/mnt", [here.get(word, word) for word in container["command"]])
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    images, mask = (
        zarr.open_group(str(volumes / name), mode="r")["0"][:] for name in ("cells.zarr", "cells-mask.zarr")
    )
    np.testing.assert_array_equal(mask != 0, images >= 128)
    assert 0 < mask.mean() < 255


@pytest.mark.parametrize("image", ["unet-serve", "unet-train", "unet-client"])
def test_an_images_bill_of_materials_is_what_is_in_it(image: str, tmp_path: Path) -> None:
    archive = tmp_path / "packages.tar"
    with archive.open("wb") as stream:
        subprocess.run(["docker/packages.sh", f"{image}:cpu"], cwd=ROOT, stdout=stream, check=True)
    made = of_image(image, archive)
    check(json.dumps(made).encode())
    found = {kind: set[str]() for kind in ("deb", "pypi")}
    for one in made["components"]:
        if "?arch=source" not in one.get("purl", ""):
            kind = "deb" if one.get("purl", "").startswith("pkg:deb/debian/") else "pypi"
            found[kind].add(f"{one['name']} {one['version']}")
    with container_of(image) as container:
        debian = inside(container, "dpkg-query", "-W", "-f", "${db:Status-Status} ${Package} ${Version}\n").splitlines()
        python = set(inside(container, "python", "-c", INSTALLED).splitlines())
    assert found["deb"] == {line.removeprefix("installed ") for line in debian if line.startswith("installed ")}
    if image == "unet-serve":
        # Triton, which lies outside Python's packages.
        python.add("nvidia-pytriton 0.5.12")
    assert found["pypi"] == python
    assert any(line.startswith("libc6 2.36") for line in found["deb"])
    assert ("tritonclient 2.50.0" in python) == (image != "unet-serve")


def test_the_packages_of_an_image_that_is_not_there_are_one_sentence() -> None:
    line = ["docker/packages.sh", "unet-none:cpu"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    said = "error: the packages of unet-none:cpu could not be read: build it first (make images)\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


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
