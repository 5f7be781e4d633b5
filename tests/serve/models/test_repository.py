from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.models.config import ModelSettings, RepositoryError, model_config
from serve.models.publish import publish
from serve.models.seal import SEAL, is_sealed
from serve.repository import main
from tests.cards import rewrite_card
from unet.card import Card, CardError
from unet.card.records import Engine, Proof
from unet.errors import UnetError
from unet.files import sha256_of
from unet.machine import numa_nodes


def read_config(repository: Path, name: str = "unet") -> Any:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    return text_format.Parse(
        (repository / name / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig()
    )


def test_a_version_holds_what_serving_takes_and_nothing_else(tiny_artefacts: Path, tmp_path: Path) -> None:
    published = publish(tiny_artefacts, tmp_path, ModelSettings())
    assert (published.path, published.version) == (tmp_path / "unet" / "1", 1)
    assert {path.name for path in published.path.iterdir()} == {
        *("model.py", "unet", "model.fp16.onnx", "card.json", "config.pbtxt")
    }
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"1", "config.pbtxt"}
    assert Card.load(published.path).verify_engine() == published.path / "model.fp16.onnx"


def test_the_configuration_says_what_clients_and_triton_need(tiny_artefacts: Path, tmp_path: Path) -> None:
    from tritonclient.grpc import model_config_pb2 as pb

    publish(
        tiny_artefacts, tmp_path, ModelSettings(max_queue_delay_us=250, max_queue_size=7, threads=3, max_tile_size=1004)
    )
    config = read_config(tmp_path)
    assert (config.name, config.backend, config.max_batch_size) == ("unet", "python", 16)
    assert [(port.name, port.data_type, list(port.dims)) for port in (*config.input, *config.output)] == [
        ("image", pb.TYPE_UINT8, [1, -1, -1]),
        ("probability", pb.TYPE_FP16, [1, -1, -1]),
    ]
    assert config.dynamic_batching.max_queue_delay_microseconds == 250
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.max_queue_size, policy.allow_timeout_override) == (7, True)
    # With a queue limit only a free instance makes the batcher look at a request at once.
    assert [(group.kind, group.count) for group in config.instance_group] == [(pb.ModelInstanceGroup.KIND_CPU, 2)]
    assert config.version_policy.latest.num_versions == 1
    assert is_sealed(config)
    assert {name: value.string_value for name, value in config.parameters.items() if name != SEAL} == {
        "tile_sizes": "204,252",
        "pixel_size_nm": "4",
        "max_tile_size": "1004",
        "profile": "cpu",
        "engine": "onnxruntime f32",
        "threads": "3",
        "core_shares": str(numa_nodes()),
        "card_sha256": sha256_of(tiny_artefacts / "card.json"),
        "card_sha256_1": sha256_of(tiny_artefacts / "card.json"),
        "tile_sizes_1": "204,252",
        "pixel_size_nm_1": "4",
    }
    assert [list(warmup.inputs["image"].dims) for warmup in config.model_warmup] == [[1, 204, 204], [1, 252, 252]]


def test_the_version_before_the_newest_is_served_on(tiny_artefacts: Path, tmp_path: Path) -> None:
    for _ in range(3):
        publish(tiny_artefacts, tmp_path, ModelSettings())
    config = read_config(tmp_path)
    assert config.version_policy.latest.num_versions == 2
    assert {"card_sha256_2", "card_sha256_3", "tile_sizes_2", "tile_sizes_3"} <= set(config.parameters)
    assert "card_sha256_1" not in config.parameters
    # One that the new configuration could not load would keep the new one from being loaded too.
    former = tmp_path / "unet" / "3" / "config.pbtxt"
    former.write_text(former.read_text(encoding="utf-8").replace('"python"', '"tensorrt"'), encoding="utf-8")
    publish(tiny_artefacts, tmp_path, ModelSettings())
    assert read_config(tmp_path).version_policy.latest.num_versions == 1
    publish(tiny_artefacts, tmp_path, ModelSettings(), keep=1)
    assert read_config(tmp_path).version_policy.latest.num_versions == 1


@given(
    settings=st.builds(
        ModelSettings,
        name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,20}", fullmatch=True),
        max_batch_size=st.integers(1, 1024),
        max_queue_delay_us=st.integers(0, 2**31 - 1),
        max_queue_size=st.integers(0, 2**31 - 1),
        instances=st.integers(1, 64),
        threads=st.integers(0, 256),
    )
)
def test_every_configuration_survives_being_written_and_read(tiny_artefacts: Path, settings: ModelSettings) -> None:
    from google.protobuf import text_format

    config = model_config(Card.load(tiny_artefacts), settings)
    assert text_format.Parse(text_format.MessageToString(config), type(config)()) == config
    assert config.dynamic_batching.max_queue_delay_microseconds == settings.queue_delay_us


def test_versions_count_on_and_keep_what_is_there(tiny_artefacts: Path, tmp_path: Path) -> None:
    first = publish(tiny_artefacts, tmp_path, ModelSettings())
    before = sha256_of(first.path)
    (tmp_path / "unet" / "7").mkdir()
    (tmp_path / "unet" / "notes").mkdir()
    assert publish(tiny_artefacts, tmp_path, ModelSettings(max_batch_size=2)).version == 8
    assert sha256_of(first.path) == before
    assert read_config(tmp_path).max_batch_size == 2


def test_publishers_at_the_same_time_get_versions_of_their_own(tiny_artefacts: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        tasks = [pool.submit(publish, tiny_artefacts, tmp_path, ModelSettings(), keep=16) for _ in range(16)]
    assert sorted(task.result().version for task in tasks) == list(range(1, 17))
    assert len(list((tmp_path / "unet").iterdir())) == 17


def test_a_published_version_can_be_published_again(tiny_artefacts: Path, tmp_path: Path) -> None:
    old = publish(tiny_artefacts, tmp_path, ModelSettings())
    publish(tiny_artefacts, tmp_path, ModelSettings())
    again = publish(old.path, tmp_path, ModelSettings())
    assert again.version == 3
    assert sha256_of(again.path) == sha256_of(old.path)


def test_an_artefact_that_is_not_its_cards_is_refused(tiny_artefacts: Path, tmp_path: Path) -> None:
    artefacts, repository = tmp_path / "artefacts", tmp_path / "models"
    shutil.copytree(tiny_artefacts, artefacts)
    with (artefacts / "model.fp16.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(CardError, match="is not the file that its card describes"):
        publish(artefacts, repository, ModelSettings())
    assert not repository.exists()


def test_a_tile_size_that_the_network_cannot_take_is_refused(tiny_artefacts: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_artefacts, tmp_path / "artefacts")
    rewrite_card(tmp_path / "artefacts", tile_sizes=[512])
    with pytest.raises(UnetError, match="512"):
        publish(tmp_path / "artefacts", tmp_path / "models", ModelSettings())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch_size", 0),
        ("max_queue_delay_us", -1),
        ("max_queue_size", -1),
        ("default_timeout_us", 2**31),
        ("instances", -1),
        ("threads", -1),
        ("max_tile_size", 1000),
        ("name", ""),
        ("name", "../unet"),
        ("name", ".unet"),
        ("name", "u net"),
    ],
)
def test_settings_check_themselves(name: str, value: object) -> None:
    with pytest.raises(RepositoryError, match=name):
        ModelSettings(**{name: value})  # type: ignore[arg-type]


def test_the_command_publishes(
    tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--artefacts", str(tiny_artefacts), "--max_batch_size", "4", "--max_queue_delay_us", "100"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("model_repository/unet/1: version 1 of unet;")
    assert read_config(tmp_path / "model_repository").max_batch_size == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--artefacts", "nowhere"], "nowhere/card.json does not exist"), (["--threads", "-1"], "threads is -1")],
)
def test_the_commands_faults_are_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("script", ["repository.py", "triton.py"])
def test_help_comes_at_once_from_any_folder(script: str, project_root: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-X", "importtime", str(project_root / "serve" / script), "--help"]
    done = subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "usage: serve/" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert not loaded & {"tensorflow", "onnx", "onnxruntime", "openvino", "tritonclient", "grpc", "scipy", "matplotlib"}


def test_a_version_carries_the_engine_to_fall_back_on(tiny_artefacts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_artefacts, tmp_path / "artefacts"))
    (folder / "model.onnx").write_bytes((folder / "model.fp16.onnx").read_bytes())
    card = Card.load(folder)
    card.record("onnx", folder / "model.onnx", None, "tests")
    proof = Proof(sha256_of(folder / "model.onnx"), "cpu")
    card.fallback = Engine("onnxruntime", "f32", "model.onnx", 1.0, proof)
    card.save()
    published = publish(folder, tmp_path / "models", ModelSettings()).path
    found = Card.load(published)
    assert found.fallback is not None
    assert found.verify_engine(found.fallback) == published / "model.onnx"


def test_an_engine_without_proof_is_not_published(tiny_artefacts: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_artefacts, tmp_path / "artefacts"))
    card = Card.load(folder)
    card.engine = dataclasses.replace(card.engine, proof=None)
    card.save()
    with pytest.raises(CardError, match=r"model\.fp16\.onnx has no proof that it computes the network"):
        publish(folder, tmp_path / "models", ModelSettings())
    assert not list(tmp_path.glob("models/unet/*"))
