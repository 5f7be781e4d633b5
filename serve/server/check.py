"""Finds what would make the server hang or fail, before it starts: Triton waits for ever for a missing model.py."""

from __future__ import annotations

import math
import shutil
from typing import TYPE_CHECKING, Any

from serve.models.backend import ENGINE_FILE, PYTHON_BACKEND, engine_text
from serve.models.config import CONFIG_FILE
from serve.models.library import OWN_BACKEND, own_library
from serve.models.publish import served_config
from serve.models.seal import is_sealed
from serve.models.versions import versions_in
from serve.server.install import TritonError
from serve.server.offers import SHARED_MEMORY_REMEDY
from serve.server.regions import SHARED_MEMORY
from unet.card import CARD_FILE, Card
from unet.card.signature import BYTECODE, SignatureError, verify
from unet.engine.cpu import EngineChoice
from unet.engine.memory import bytes_per_pixel, total_memory
from unet.files import sha256_of
from unet.geometry import output_size
from unet.names import INPUT

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LFS_POINTER = b"version https://git-lfs"
# What the python backend sets aside for each copy of a network, before any tile.
_COPY_MIB = 1


def check_repository(repository: Path, public_key: Path | None = None) -> list[str]:
    """The names of the models in a repository, each of which is complete and has room to run.

    Args:
        repository: folder of the models.
        public_key: file with the key that must have signed them; None takes unsigned ones.

    Raises:
        SignatureError: a version is not what the owner of the key signed.
        TritonError: there is no model, or one that this server could not load; it says what to do.
        CardError: a model's network is not the file that its card describes.
        RepositoryError: a version's folder has a name that Triton does not take.
    """
    paths = sorted(path for path in repository.glob(f"*/{CONFIG_FILE}") if path.parent.name[0] != ".")
    if not paths:
        raise TritonError(
            f"{repository} holds no model: publish one with `python serve/repository.py --artefacts ARTEFACTS`"
        )
    configs = [_parse(path) for path in paths]
    for path, config in zip(paths, configs):
        if public_key is not None:
            check_signed(path.parent, public_key)
        _check_model(path, config)
    _check_shared_memory(configs)
    return [path.parent.name for path in paths]


def check_signed(model: Path, public_key: Path) -> None:
    """Refuse a model unless the owner of a key signed each served version, and so all that its configuration says.

    Args:
        model: the model's folder.
        public_key: file with the key.

    Raises:
        SignatureError: naming the file that was not signed, or is another one.
    """
    from google.protobuf import text_format

    path, versions = model / CONFIG_FILE, versions_in(model)
    config = _parse(path)
    served = versions[-max(1, config.version_policy.latest.num_versions) :]
    for version in served:
        verify(model / str(version), public_key)
        _remove_bytecode(model / str(version))
    # The configuration of all is no file of a version: it follows from what is signed in each.
    if not served or config != text_format.Parse(served_config(model, served[-1], keep=len(served)), type(config)()):
        raise SignatureError(f"{path} is not what the signed versions say: publish the model again")


def _remove_bytecode(version: Path) -> None:
    for folder in sorted(version.rglob(BYTECODE)):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise SignatureError(
                f"{folder} was not signed, and Python would run it; it cannot be removed ({error.strerror}): remove it"
            ) from error


def _check_model(path: Path, config: Any) -> None:
    folder = path.parent
    if config.name != folder.name:
        raise TritonError(f"{path} is of the model {config.name!r}, not {folder.name}: publish the model again")
    if config.backend == OWN_BACKEND and not own_library().is_file():
        raise TritonError(
            f"{path} wants the backend {OWN_BACKEND}, which is not built here ({own_library()}): run `make install`, "
            "or publish again"
        )
    if config.backend not in (PYTHON_BACKEND, OWN_BACKEND):
        raise TritonError(
            f"{path} wants the backend {config.backend}, which this Triton lacks: serve it in the container "
            "(docker/compose.yaml), or publish with --profile cpu"
        )
    versions = versions_in(folder)
    if not versions:
        raise TritonError(f"{folder} has a {CONFIG_FILE} but no version: publish the model again")
    for version in versions[-max(1, config.version_policy.latest.num_versions) :]:
        _check_version(folder / str(version), config)
    newest = folder / str(versions[-1])
    card = newest / CARD_FILE
    if card.is_file() and config.parameters["card_sha256"].string_value != sha256_of(card):
        raise TritonError(
            f"{path} was not published with version {newest.name}, as when publishing was interrupted: publish it again"
        )
    if card.is_file() and not is_sealed(config):
        raise TritonError(f"{path} is not as it was published: publish the model again")


def _check_version(version: Path, config: Any) -> None:
    code = version / (config.default_model_filename or "model.py")
    if not code.is_file():
        raise TritonError(f"{code} is missing, so that Triton could not load version {version.name}: publish it again")
    for path in version.rglob("*"):
        if path.is_file():
            _require_no_pointer(path)
    if (version / CARD_FILE).is_file():
        card = Card.load(version)
        if card.has_engine:
            card.verify_engine()
            _check_memory(version, card)
        text = version / ENGINE_FILE
        if config.backend == OWN_BACKEND and text.read_text(encoding="utf-8") != engine_text(card):
            raise TritonError(f"{text} does not say what {CARD_FILE} beside it says: publish it again")


def _check_memory(version: Path, card: Card) -> None:
    """Triton tries the largest tile before it is ready, and the system would kill the model's process."""
    pixel_bytes = bytes_per_pixel(EngineChoice(card.engine.kind, card.engine.precision), card.model.get("base_filters"))
    needed, there = max(card.tile_sizes) ** 2 * pixel_bytes, total_memory()
    if needed > there:
        raise TritonError(
            f"{version} is for tiles of up to {max(card.tile_sizes)} pixels, of which a pass takes {needed >> 20} MiB; "
            f"this machine, or its container, has {there >> 20}: export with smaller --tile_sizes, and publish again"
        )


def _require_no_pointer(path: Path) -> None:
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise TritonError(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull`")


def _check_shared_memory(configs: Sequence[Any]) -> None:
    """Each copy of a network in the python backend needs room for itself and its largest tile, which is tried first."""
    needed_mib = sum(
        sum(group.count for group in config.instance_group) * (_COPY_MIB + _tile_mib(config))
        for config in configs
        if config.backend == PYTHON_BACKEND
    )
    if not needed_mib:
        return
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError as error:
        raise TritonError(
            f"{SHARED_MEMORY}, which the python backend needs, cannot be used: {error.strerror}"
        ) from error
    if free < needed_mib << 20:
        raise TritonError(
            f"{SHARED_MEMORY} has {free >> 20} MiB free, and the python backend needs {needed_mib} there: "
            f"{SHARED_MEMORY_REMEDY}"
        )


def _tile_mib(config: Any) -> int:
    """Shared memory for the largest tile and its answer, each of which takes whole MiB."""
    side = max((int(warmup.inputs[INPUT].dims[-1]) for warmup in config.model_warmup), default=0)
    return sum(math.ceil(size / 2**20) for size in (side**2, 2 * output_size(side) ** 2)) if side else 0


def _parse(path: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    _require_no_pointer(path)
    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise TritonError(f"{path} is not a configuration of Triton's ({error}): publish the model again") from error
