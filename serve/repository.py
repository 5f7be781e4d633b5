"""Publishes exported artefacts as a new version of a Triton model: ``python serve/repository.py --artefacts DIR``."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unet.card import CARD_FILE, Card
from unet.errors import UnetError, command, say
from unet.files import atomic_directory, atomic_file, sha256_of
from unet.geometry import output_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

BACKEND_CODE = Path(__file__).resolve().parent / "python_backend" / "model.py"


class RepositoryError(UnetError):
    """A model that cannot be published."""


@dataclass(frozen=True)
class ModelSettings:
    """How Triton runs a model.

    Attributes:
        name: the model's name.
        max_batch_size: most tiles in one pass of the engine.
        max_queue_delay_us: how long a request waits for others to share its pass, in microseconds. On a CPU a shared
            pass gains a few per cent, less than any wait costs a lone request.
        max_queue_size: requests that may wait, more are refused at once; 0 sets no limit.
        default_timeout_us: how long a request may wait in the queue, in microseconds, unless it asks for another time;
            0 sets no limit. With either limit Triton 2.50 stops fetching the next request before the last one's
            instance is free, and on a CPU a lone client then waits half a second for one request in twenty or so.
        instances: copies of the network.
        threads: that each of them computes with; 0 shares out the cores of the machine that serves.
    """

    name: str = "unet"
    max_batch_size: int = 16
    max_queue_delay_us: int = 0
    max_queue_size: int = 0
    default_timeout_us: int = 0
    instances: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        least = {"max_batch_size": 1, "max_queue_delay_us": 0, "max_queue_size": 0, "default_timeout_us": 0}
        for name, limit in {**least, "instances": 1, "threads": 0}.items():
            if not limit <= getattr(self, name) < 2**31:
                raise RepositoryError(f"{name} is {getattr(self, name)}; it must be at least {limit}, and below 2^31")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", self.name):
            raise RepositoryError(f"the model name {self.name!r} must consist of letters, digits, -, _ and .")


@dataclass(frozen=True)
class PublishedVersion:
    """A version that Triton can load."""

    path: Path
    version: int


def model_config(card: Card, settings: ModelSettings) -> Any:
    """The model's configuration as Triton's own message, ``inference.ModelConfig``.

    Whatever the served network needs lies in its version's card; the parameters here are for clients to read,
    except ``threads``.

    Raises:
        GeometryError: a tile size on the card that the network cannot take.
    """
    from tritonclient.grpc import model_config_pb2 as pb

    config = pb.ModelConfig(
        name=settings.name,
        backend="python",
        max_batch_size=settings.max_batch_size,
        input=[pb.ModelInput(name="image", data_type=pb.TYPE_UINT8, dims=[1, -1, -1])],
        output=[pb.ModelOutput(name="probability", data_type=pb.TYPE_FP16, dims=[1, -1, -1])],
        instance_group=[pb.ModelInstanceGroup(kind=pb.ModelInstanceGroup.KIND_CPU, count=settings.instances)],
        version_policy=pb.ModelVersionPolicy(latest=pb.ModelVersionPolicy.Latest(num_versions=1)),
    )
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = settings.max_queue_delay_us
    if settings.max_queue_size or settings.default_timeout_us:
        policy = batching.default_queue_policy
        policy.max_queue_size = settings.max_queue_size
        policy.default_timeout_microseconds = settings.default_timeout_us
        policy.allow_timeout_override = True
    # The first real request must not pay for what an engine sets up at its first pass of a size.
    for size in card.tile_sizes:
        output_size(size)
        warmup = config.model_warmup.add(name=f"tile_{size}", batch_size=1)
        image = warmup.inputs["image"]
        image.data_type, image.random_data = pb.TYPE_UINT8, True
        image.dims.extend([1, size, size])
    engine = card.engine
    parameters = {
        "tile_sizes": ",".join(str(size) for size in card.tile_sizes),
        "engine": f"{engine.kind} {engine.precision}",
        "threads": str(settings.threads),
        "card_sha256": sha256_of(card.folder / CARD_FILE),
    }
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return config


def publish(
    artefacts: str | os.PathLike[str], repository: str | os.PathLike[str], settings: ModelSettings
) -> PublishedVersion:
    """Make artefacts the next version of the model.

    A version appears whole, and none is ever overwritten; the configuration is replaced after the version is there.
    A published version's folder is a folder of artefacts too: to go back to one is to publish it again.

    Raises:
        CardError: an artefact is not what its card says.
    """
    from google.protobuf import text_format

    card = Card.load(artefacts)
    config = model_config(card, settings)
    engine = card.verify_engine()
    folder = Path(repository) / settings.name
    with _sole_publisher(folder):
        version = max([0, *(int(path.name) for path in folder.iterdir() if path.name.isdecimal())]) + 1
        with atomic_directory(folder / str(version)) as aside:
            shutil.copyfile(BACKEND_CODE, aside / "model.py")
            shutil.copyfile(engine, aside / card.engine.file)
            shutil.copyfile(card.folder / CARD_FILE, aside / CARD_FILE)
        with atomic_file(folder / "config.pbtxt") as aside:
            aside.write_text(text_format.MessageToString(config), encoding="utf-8")
    return PublishedVersion(folder / str(version), version)


@contextlib.contextmanager
def _sole_publisher(folder: Path) -> Iterator[None]:
    """Let no two processes choose the same next version; the lock ends with its holder."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Publish a new version."""
    default = ModelSettings()
    parser = argparse.ArgumentParser(
        prog="serve/repository.py", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--artefacts", type=Path, default=Path("artefacts"), help="folder that export/main.py wrote")
    parser.add_argument("--model_repository", type=Path, default=Path("model_repository"), help="where to publish")
    parser.add_argument("--model_name", default=default.name, help="the model's name")
    parser.add_argument("--max_batch_size", type=int, default=default.max_batch_size, help="most tiles in one pass")
    parser.add_argument(
        "--max_queue_delay_us", type=int, default=default.max_queue_delay_us, help="wait for others to share a pass"
    )
    parser.add_argument(
        "--max_queue_size", type=int, default=default.max_queue_size, help="requests that may wait; 0: any"
    )
    parser.add_argument("--instances", type=int, default=default.instances, help="copies of the network")
    parser.add_argument(
        "--threads", type=int, default=default.threads, help="threads of each copy; 0 shares out the cores"
    )
    chosen = parser.parse_args(argv)
    settings = ModelSettings(
        name=chosen.model_name,
        max_batch_size=chosen.max_batch_size,
        max_queue_delay_us=chosen.max_queue_delay_us,
        max_queue_size=chosen.max_queue_size,
        instances=chosen.instances,
        threads=chosen.threads,
    )
    published = publish(chosen.artefacts, chosen.model_repository, settings)
    say(
        f"{published.path}: version {published.version} of {settings.name}; a running server takes it at its next start"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
