"""A published configuration holds the hash of all that it says, so that a changed or damaged one is not served."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from serve.models.errors import RepositoryError

if TYPE_CHECKING:
    from pathlib import Path

SEAL = "config_sha256"


def seal(config: Any) -> Any:
    """Enter the hash into a configuration, in place of a former one; returns it."""
    if SEAL in config.parameters:
        del config.parameters[SEAL]
    config.parameters[SEAL].string_value = _hash_of(config)
    return config


def is_sealed(config: Any) -> bool:
    """Whether a configuration says what it said when it was published."""
    return SEAL in config.parameters and config.parameters[SEAL].string_value == _hash_of(config)


def _hash_of(config: Any) -> str:
    rest = type(config)()
    rest.CopyFrom(config)
    if SEAL in rest.parameters:
        del rest.parameters[SEAL]
    return hashlib.sha256(rest.SerializeToString(deterministic=True)).hexdigest()


def read_config(path: Path) -> Any:
    """A version's configuration, ``inference.ModelConfig``.

    Raises:
        RepositoryError: it is none, or not as it was published.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RepositoryError(
            f"{path} is not a configuration of Triton's ({error}): publish the model again"
        ) from error
    if not is_sealed(config):
        raise RepositoryError(f"{path} is not as it was published: publish the model again")
    return config
