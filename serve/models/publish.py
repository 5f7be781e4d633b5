"""Publishes exported artefacts as a new version of a Triton model, or goes back to a former one."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import unet
from serve.models.backend import BACKEND_CODE_FILE, ENGINE_FILE, PYTHON_BACKEND, cpu_backend, engine_text
from serve.models.config import (
    CONFIG_FILE,
    ModelSettings,
    RepositoryError,
    about_version,
    engine_file,
    model_config,
)
from serve.models.seal import read_config, seal
from serve.models.signing import NO_SIGNING, Signing
from serve.models.versions import former_version, remove_unfinished, too_old, versions_in
from unet.card import CARD_FILE, Card, CardError
from unet.errors import UnetError, warn
from unet.files import atomic_directory, atomic_file, remove_directory, sha256_of, take_lock
from unet.files.copies import copy_files

if TYPE_CHECKING:
    from collections.abc import Iterator

LOGGER = logging.getLogger(__name__)
BACKEND_CODE = Path(__file__).resolve().parent / "python_backend" / BACKEND_CODE_FILE
# What that imports of the project; a version carries it, so that it needs no project where it is served.
BACKEND_MODULES = (
    *("__init__", "card/__init__", "card/records", "engine/__init__", "engine/cpu", "engine/memory"),
    *("errors", "files/__init__", "files/naming", "geometry", "machine", "names"),
)
KEEP = 5

# Has a running server take a version of the model of this name.
Load = Callable[[str, int], None]


@dataclass(frozen=True)
class PublishedVersion:
    """A version that Triton can load."""

    path: Path
    version: int


def publish(
    artefacts: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    settings: ModelSettings,
    *,
    keep: int = KEEP,
    load: Load | None = None,
    signing: Signing = NO_SIGNING,
) -> PublishedVersion:
    """Make artefacts the next version of the model.

    A version appears whole, and none is ever overwritten; the configuration is replaced after the version is there.
    Each version keeps the configuration that it was published with. The server still serves the version before.

    Args:
        artefacts: folder that the exporter wrote, or that of a published version.
        repository: folder of the models.
        settings: how Triton runs the model.
        keep: versions that stay, the new one included; older ones are removed at last.
        load: has a running server take the version; if that fails, the version and its configuration are taken back.
        signing: whose signature the artefacts must have, and who signs the version.

    Raises:
        CardError: an artefact is not what its card says, or there is none for the profile.
        SignatureError: the artefacts are not what the owner of the key signed.
        RepositoryError: the plan is for another GPU, or the server did not take the version.
    """
    signing.check(Path(artefacts))
    card = Card.load(artefacts)
    files, texts = _content_of(card, settings)

    def fill(aside: Path) -> None:
        for name, path in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, aside / name)
        for name, text in texts.items():
            (aside / name).write_text(text, encoding="utf-8")
        if signing.signer is not None:
            signing.signer.sign(aside)

    folder = Path(repository) / settings.name
    folder.mkdir(parents=True, exist_ok=True)
    with _sole_publisher(folder):
        return _release(folder, fill, keep, load)


def rollback(
    repository: str | os.PathLike[str],
    name: str = "unet",
    version: int | None = None,
    *,
    keep: int = KEEP,
    load: Load | None = None,
    signing: Signing = NO_SIGNING,
) -> PublishedVersion:
    """Serve a former version again: a copy of it, with its configuration, becomes the next version.

    Versions only ever count up, so that an answer's version says which network gave it.

    Args:
        repository: folder of the models.
        name: the model's name.
        version: which to go back to; by default the newest that differs from the present one.
        keep: versions that stay, the new one included.
        load: has a running server take the version; if that fails, it is taken back.
        signing: whose signature the version must have; the copy keeps it, unless another is asked for.

    Raises:
        CardError: the version's files are not what its card says.
        SignatureError: the version is not what the owner of the key signed.
        RepositoryError: there is no such version, or the server did not take it.
    """
    folder = Path(repository) / name
    if not folder.is_dir():
        raise RepositoryError(f"{folder} does not exist: name the model with --model_name")
    with _sole_publisher(folder):
        source = folder / str(former_version(folder) if version is None else version)
        if not (source / CONFIG_FILE).is_file():
            known = ", ".join(map(str, versions_in(folder))) or "none"
            raise RepositoryError(f"{source} is no version to go back to; there are {known}")
        signing.check(source)
        _verify(source)

        def fill(aside: Path) -> None:
            copy_files(source, aside)
            if signing.signer is not None:
                signing.signer.sign(aside)

        return _release(folder, fill, keep, load)


def _content_of(card: Card, settings: ModelSettings) -> tuple[dict[str, Path], dict[str, str]]:
    """What a version holds, by name: the files that are copied, and what is written."""
    from google.protobuf import text_format

    texts = {CONFIG_FILE: text_format.MessageToString(seal(model_config(card, settings)))}
    engine = engine_file(card, settings)
    files = {engine.name: engine, CARD_FILE: card.folder / CARD_FILE}
    if settings.machine.on_gpu:
        return files, texts
    if card.fallback is not None:
        fallback = card.verify_engine(card.fallback)
        files[fallback.name] = fallback
    backend, note = cpu_backend(card, settings.backend)
    if note:
        warn(note)
    if backend == PYTHON_BACKEND:
        package = Path(unet.__file__).parent
        files[BACKEND_CODE_FILE] = BACKEND_CODE
        files |= {f"{package.name}/{name}.py": package / f"{name}.py" for name in BACKEND_MODULES}
    else:
        texts[ENGINE_FILE] = engine_text(card)
    return files, texts


def _verify(version: Path) -> None:
    card = Card.load(version)
    config = read_config(version / CONFIG_FILE)
    if config.parameters["card_sha256"].string_value != sha256_of(version / CARD_FILE):
        raise RepositoryError(f"{version / CARD_FILE} is not the card that the version was published with")
    for name, artefact in card.artefacts.items():
        if (version / artefact.file).exists():
            card.verify(name)


def _release(folder: Path, fill: Callable[[Path], None], keep: int, load: Load | None) -> PublishedVersion:
    """Add the next version, make its configuration the model's, have it loaded, and remove what is too old."""
    if keep < 1:
        raise RepositoryError(f"keep is {keep}; the new version itself is one, so it must be at least 1")
    version = max([0, *versions_in(folder)]) + 1
    path, config = folder / str(version), folder / CONFIG_FILE
    former = config.read_bytes() if config.exists() else None
    try:
        with atomic_directory(path) as aside:
            fill(aside)
    except BaseException:
        if path.is_dir():  # it has its name, which did not reach the disk
            _take_back(path, former)
        raise
    try:
        _replace(config, served_config(folder, version, keep).encode())
        if load is not None:
            load(folder.name, version)
    except BaseException as error:
        _take_back(path, former)
        if not isinstance(error, UnetError):
            raise
        raise RepositoryError(f"version {version} of {folder.name} was taken back: {error}") from error
    for old in too_old(folder, keep):
        try:
            remove_directory(old)
        except OSError as error:  # the new version is live, and that counts
            LOGGER.warning("the former version %s stays: %s", old, error.strerror)
    return PublishedVersion(path, version)


def served_config(folder: Path, version: int, keep: int) -> str:
    """A version's configuration, completed for the version before it, which is served on.

    So a client that began with that one finishes with it. The configuration says what a client must know of
    each, since Triton gives one for both. A former version that it cannot load is not served.
    """
    from google.protobuf import text_format

    config = read_config(folder / str(version) / CONFIG_FILE)
    others = [other for other in versions_in(folder) if other < version]
    served = [version]
    if keep > 1 and others and _loads_alike(folder / str(others[-1]), config):
        served.append(others[-1])
    config.version_policy.latest.num_versions = len(served)
    for number in served:
        for name, value in about_version(Card.load(folder / str(number))).items():
            config.parameters[f"{name}_{number}"].string_value = value
    return str(text_format.MessageToString(seal(config)))


def _loads_alike(version: Path, config: Any) -> bool:
    """Whether a version is intact, and was published for the backend and the file that a configuration names."""
    try:
        former = read_config(version / CONFIG_FILE)
        _verify(version)
    except (OSError, CardError, RepositoryError):
        return False
    return (former.backend, former.default_model_filename) == (config.backend, config.default_model_filename)


def _take_back(path: Path, former: bytes | None) -> None:
    config = path.parent / CONFIG_FILE
    if former is None:
        config.unlink(missing_ok=True)
    elif config.read_bytes() != former:
        _replace(config, former)
    try:
        remove_directory(path)
    except OSError:  # a full disk has no room for the hidden folder that files are removed from
        shutil.rmtree(path)


def _replace(config: Path, content: bytes) -> None:
    with atomic_file(config) as aside:
        aside.write_bytes(content)


@contextlib.contextmanager
def _sole_publisher(folder: Path) -> Iterator[None]:
    """Let no two processes choose the same next version; the lock ends with its holder, whose leavings go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        take_lock(descriptor, wait=True)
        remove_unfinished(folder)
        yield
    finally:
        os.close(descriptor)
