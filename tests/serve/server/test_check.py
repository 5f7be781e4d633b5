"""What would make Triton hang or fail is one sentence before it starts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from serve.models.config import ModelSettings, RepositoryError
from serve.models.publish import publish
from serve.models.versions import versions_in
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings, admin_key
from serve.triton import main
from tests.cards import rewrite_card
from tests.serve.server.conftest import MakeSettings, in_namespace
from unet.card import CardError


def test_a_repository_without_a_model_is_refused(
    tmp_path: Path, settings_for: MakeSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--model_repository", str(tmp_path), "--state_dir", str(tmp_path / "state")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no model: publish one with")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.pbtxt").write_text('name: "unet" backend: "python"')
    with pytest.raises(TritonError, match="no version"):
        TritonServer(settings_for(tmp_path)).start()


def test_what_would_make_triton_hang_or_fail_is_found_before_it_starts(
    repository: Path, settings_for: MakeSettings
) -> None:
    model, settings = repository / "unet", settings_for(repository)
    config = (model / "config.pbtxt").read_text()

    def refuses(words: str) -> None:
        with pytest.raises(TritonError, match=words):
            TritonServer(settings).start()
        assert not settings.log.exists()

    for content, words in (
        ("what is this {", "is not a configuration of Triton's"),
        (config.replace('name: "unet"', 'name: "vnet"', 1), "is of the model 'vnet', not unet"),
        (config.replace("card_sha256", "card"), "was not published with version 1, as when publishing was interrupted"),
    ):
        (model / "config.pbtxt").write_text(content)
        refuses(words)
    (model / "config.pbtxt").write_text(config)
    (model / "1" / "model.py").unlink()
    refuses(r"1/model\.py is missing, so that Triton could not load version 1: publish it again")


def test_weights_that_are_not_the_cards_are_one_sentence(repository: Path, settings_for: MakeSettings) -> None:
    weights, settings = repository / "unet" / "1" / "model.fp16.onnx", settings_for(repository)
    content = weights.read_bytes()
    for change, words in (
        (lambda: weights.write_bytes(content[:-1]), r"model\.fp16\.onnx is not the file that its card describes"),
        (weights.unlink, r"model\.fp16\.onnx is missing although .*card\.json lists it"),
        (
            lambda: weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            r"model\.fp16\.onnx is a git-lfs pointer, not the file itself: run `git lfs pull`$",
        ),
    ):
        change()
        with pytest.raises((TritonError, CardError), match=words) as caught:
            TritonServer(settings).start()
        assert "\n" not in str(caught.value)
        assert not settings.log.exists()


def test_a_configuration_that_is_a_pointer_is_named(repository: Path, settings_for: MakeSettings) -> None:
    (repository / "unet" / "config.pbtxt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(TritonError, match=r"config\.pbtxt is a git-lfs pointer"):
        TritonServer(settings_for(repository)).start()


@pytest.mark.parametrize("name", ["03", "٣"])
def test_a_version_folder_with_another_number_is_named(
    name: str, repository: Path, tiny_artefacts: Path, settings_for: MakeSettings
) -> None:
    folder = (repository / "unet" / "1").rename(repository / "unet" / name)
    with pytest.raises(RepositoryError, match=rf"{folder} is named with leading zeros.* rename it to 3, or remove it"):
        TritonServer(settings_for(repository)).start()
    with pytest.raises(RepositoryError, match="rename it to 3"):
        publish(tiny_artefacts, repository, ModelSettings())
    folder.rename(repository / "unet" / "3")
    assert versions_in(repository / "unet") == [3]


def test_too_little_shared_memory_is_one_sentence(repository: Path, settings_for: MakeSettings) -> None:
    settings = settings_for(repository)
    line = [sys.executable, "serve/triton.py", "start", "--model_repository", str(repository)]
    line += [word for name, port in settings.ports.items() for word in (f"--{name}", str(port))]
    line += ["--state_dir", str(settings.state_dir)]
    done = in_namespace("mount -t tmpfs -o size=1M tmpfs /dev/shm", line)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("error: /dev/shm has 1 MiB free, and the python backend needs 3 there: give it 256")
    assert done.stderr.count("\n") == 1


def test_a_tile_size_beyond_the_machines_memory_is_one_sentence(
    repository: Path, tiny_artefacts: Path, settings_for: MakeSettings, tmp_path: Path
) -> None:
    shutil.copytree(tiny_artefacts, tmp_path / "artefacts")
    card = tmp_path / "artefacts" / "card.json"
    rewrite_card(card.parent, tile_sizes=[204, 40_012])
    publish(card.parent, repository, ModelSettings())
    settings = settings_for(repository)
    with pytest.raises(TritonError, match=r"tiles of up to 40012 pixels, of which a pass takes \d+ MiB; this machine"):
        TritonServer(settings).start()
    assert not settings.log.exists()


FILL_THE_DISK_AND_MAKE_A_KEY = """
import sys
from pathlib import Path
from serve.server.install import TritonError
from serve.server.settings import ServerSettings, admin_key

folder = Path(sys.argv[1])
settings = ServerSettings(folder, folder, folder)
with (folder / "filler").open("wb", buffering=0) as stream:
    try:
        while True:
            stream.write(bytes(4096))
    except OSError:
        pass
try:
    admin_key(settings)
except TritonError as error:
    print(error)
print(sorted(path.name for path in folder.iterdir()))
(folder / "filler").unlink()
print(len(admin_key(settings)[1]))
"""


def test_a_full_disk_leaves_no_half_key(tmp_path: Path) -> None:
    line = [sys.executable, "-c", FILL_THE_DISK_AND_MAKE_A_KEY, str(tmp_path)]
    done = in_namespace(f"mount -t tmpfs -o size=64k tmpfs {tmp_path}", line)
    assert done.stdout.splitlines() == [
        f"the admin key cannot be written to {tmp_path}/admin.key (No space left on device): free some space, or "
        "choose another --state_dir",
        "['filler']",
        "43",
    ]


def test_a_full_disk_is_one_sentence_before_the_start(repository: Path, settings_for: MakeSettings) -> None:
    folder = settings_for(repository).state_dir
    folder.mkdir()
    line = [sys.executable, "serve/triton.py", "start", "--model_repository", str(repository)]
    done = in_namespace(f"mount -t tmpfs -o size=64k tmpfs {folder}", [*line, "--state_dir", str(folder)])
    assert done.returncode == 2, done
    assert done.stderr.startswith(f"error: the disk of {folder} has 64 KiB free, too little for state and log: free")


def test_the_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    path, key = admin_key(ServerSettings(tmp_path, tmp_path, tmp_path))
    assert path.stat().st_mode & 0o777 == 0o600
    assert admin_key(ServerSettings(tmp_path, tmp_path, tmp_path)) == (path, key)
