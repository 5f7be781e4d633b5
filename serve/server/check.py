"""Finds before the server starts what would make it hang or fail: Triton waits for ever for a missing model.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serve.models.config import CONFIG_FILE
from serve.models.publish import versions_in
from serve.server.install import TritonError
from unet.card import CARD_FILE
from unet.files import sha256_of

if TYPE_CHECKING:
    from pathlib import Path


def check_repository(repository: Path) -> list[str]:
    """The names of the models in a repository, each of which is complete.

    Raises:
        TritonError: there is none, or one that this server could not load; with what to do.
    """
    configs = sorted(path for path in repository.glob(f"*/{CONFIG_FILE}") if path.parent.name[0] != ".")
    if not configs:
        raise TritonError(
            f"{repository} holds no model: publish one with `python serve/repository.py --artefacts ARTEFACTS`"
        )
    for path in configs:
        _check_model(path)
    return [path.parent.name for path in configs]


def _check_model(path: Path) -> None:
    folder, config = path.parent, _parse(path)
    if config.name != folder.name:
        raise TritonError(f"{path} is of the model {config.name!r}, not {folder.name}: publish the model again")
    if config.backend != "python":
        raise TritonError(
            f"{path} wants the backend {config.backend}, which this Triton lacks: serve it in the container "
            "(docker/compose.yaml), or publish with --profile cpu"
        )
    versions = versions_in(folder)
    if not versions:
        raise TritonError(f"{folder} has a {CONFIG_FILE} but no version: publish the model again")
    newest = folder / str(versions[-1])
    code = newest / (config.default_model_filename or "model.py")
    if not code.is_file():
        raise TritonError(f"{code} is missing, so that Triton could not load version {newest.name}: publish it again")
    card = newest / CARD_FILE
    if card.is_file() and config.parameters["card_sha256"].string_value != sha256_of(card):
        raise TritonError(
            f"{path} was not published with version {newest.name}, as when publishing was interrupted: publish it again"
        )


def _parse(path: Path) -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise TritonError(f"{path} is not a configuration of Triton's ({error}): publish the model again") from error
