from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.models.config import PROFILES, ModelSettings, RepositoryError, model_config
from serve.models.publish import publish, rollback
from serve.models.versions import versions_in
from serve.repository import main
from serve.server.control import ModelControl, control_of
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings, read_admin_key
from serve.server.state import load_state
from tests.serve.conftest import TILE_SIZES, artefacts_dividing_by, enter_engine
from unet.card import Card, CardError
from unet.card.records import Engine, Proof
from unet.files import sha256_of
from unet.processes import free_ports


@pytest.fixture(scope="module")
def other_artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return artefacts_dividing_by(tmp_path_factory.mktemp("other") / "artefacts", 510)


@pytest.fixture(scope="module")
def plan_artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card with a plan, which nothing here can load: what is written about it is looked at."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "model.plan").write_bytes(b"a plan")
    card = Card(folder)
    card.tile_sizes = TILE_SIZES
    facts = {"compute_capability": "7.0", "max_batch_size": 16, "context_bytes": 1 << 30, "weight_bytes": 1 << 26}
    proof = Proof(sha256_of(folder / "model.plan"), "gpu 7.0")
    versions = {"tensorrt": "10.4.0"}
    profiles = [[[1, 1, size, size]] * 3 for size in TILE_SIZES]
    card.record(
        "plan", folder / "model.plan", None, "tests", proof=proof, versions=versions, profiles=profiles, **facts
    )
    card.save()
    return folder


@pytest.fixture(scope="module")
def explicit(tiny_artefacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A real Triton with explicit model control."""
    folder = tmp_path_factory.mktemp("explicit")
    publish(tiny_artefacts, folder / "models", ModelSettings())
    http, grpc, metrics = free_ports(3)
    configured = ServerSettings(
        folder / "models", folder / "log", folder / "state", http, grpc, metrics, model_control="explicit"
    )
    with TritonServer(configured) as server:
        yield server


def control(server: TritonServer) -> ModelControl:
    return control_of(server.settings.state_dir)


def served(server: TritonServer) -> tuple[str, float]:
    """The version that answers, and the largest probability of a white tile."""
    from tritonclient import grpc

    tensor = grpc.InferInput("image", [1, 1, 204, 204], "UINT8")
    tensor.set_data_from_numpy(np.full((1, 1, 204, 204), 255, np.uint8))
    with grpc.InferenceServerClient(server.settings.grpc_url) as client:
        answer = client.infer("unet", [tensor])
    return answer.get_response().model_version, float(answer.as_numpy("probability").max())


def test_a_version_published_under_traffic_fails_no_request(explicit: TritonServer, other_artefacts: Path) -> None:
    repository = explicit.settings.repository
    before, value = served(explicit)
    seen: list[tuple[str, float]] = []
    failures: list[Exception] = []
    enough = threading.Event()

    def ask() -> None:
        while not enough.is_set():
            try:
                seen.append(served(explicit))
            except Exception as error:
                failures.append(error)

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        new = publish(other_artefacts, repository, ModelSettings(), load=control(explicit).load)
    finally:
        enough.set()
        for client in clients:
            client.join()
    assert not failures
    after = served(explicit)
    assert after[0] == str(new.version)
    assert after[1] == pytest.approx(0.5, abs=1e-3)
    assert set(seen) <= {(before, value), after}
    assert len(seen) > 4

    state_dir = explicit.settings.state_dir
    line = ["--rollback", "--model_repository", str(repository), "--load", "--state_dir", str(state_dir)]
    assert main(line) == 0
    assert served(explicit) == (str(new.version + 1), value)


def test_a_version_that_the_server_refuses_is_taken_back(
    explicit: TritonServer, tiny_artefacts: Path, tmp_path: Path
) -> None:
    folder = explicit.settings.repository / "unet"
    before, versions, config = served(explicit), versions_in(folder), (folder / "config.pbtxt").read_bytes()
    shutil.copytree(tiny_artefacts, tmp_path / "artefacts")
    (tmp_path / "artefacts" / "model.fp16.onnx").write_bytes(b"no network")
    card = Card.load(tmp_path / "artefacts")
    enter_engine(card)
    card.save()
    with pytest.raises(RepositoryError, match=r"was taken back: .* could not load unet"):
        publish(tmp_path / "artefacts", folder.parent, ModelSettings(max_batch_size=3), load=control(explicit).load)
    assert (versions_in(folder), (folder / "config.pbtxt").read_bytes()) == (versions, config)
    assert served(explicit) == before


def test_answers_are_kept_where_that_is_asked_for(tiny_artefacts: Path, tmp_path: Path) -> None:
    from tritonclient import grpc

    publish(tiny_artefacts, tmp_path / "models", ModelSettings(response_cache=True))
    http, rpc, metrics = free_ports(3)
    settings = ServerSettings(
        tmp_path / "models", tmp_path / "log", tmp_path / "state", http, rpc, metrics, response_cache_mib=16
    )
    with TritonServer(settings) as server:
        first = served(server)
        assert served(server) == first
        with grpc.InferenceServerClient(server.settings.grpc_url) as client:
            (counts,) = client.get_inference_statistics("unet").model_stats
    assert (counts.inference_stats.cache_hit.count, counts.inference_stats.cache_miss.count) == (1, 1)


def test_model_control_and_the_rest_of_administration_need_the_key(explicit: TritonServer) -> None:
    from tritonclient import grpc, http
    from tritonclient.utils import InferenceServerException

    state = load_state(explicit.settings.state_dir)
    assert state is not None
    key_file = Path(state.admin_key_file)
    assert key_file.stat().st_mode & 0o777 == 0o600
    wrong = ModelControl(state, "x" * 20)
    with pytest.raises(TritonError, match=r"restricted"):
        wrong.reload("unet")
    with (
        grpc.InferenceServerClient(explicit.settings.grpc_url) as over_grpc,
        http.InferenceServerClient(explicit.settings.http_url) as over_http,
    ):
        for client in (over_grpc, over_http):
            for ask in (
                lambda client=client: client.unload_model("unet"),
                client.get_model_repository_index,
                client.get_log_settings,
                lambda client=client: client.update_log_settings({"log_verbose_level": 1}),
                client.get_trace_settings,
            ):
                with pytest.raises(InferenceServerException, match="restricted"):
                    ask()
        header = {"triton-grpc-protocol-admin-key": read_admin_key(key_file)}
        assert "unet" in {model.name for model in over_grpc.get_model_repository_index(headers=header).models}
    assert served(explicit)[0]


def accepted_by(server: TritonServer, config: Any) -> str:
    """What the server's loader says to a configuration: nothing if it takes it."""
    from google.protobuf import json_format
    from tritonclient import http
    from tritonclient.utils import InferenceServerException

    state = load_state(server.settings.state_dir)
    assert state is not None
    header = {"admin-key": read_admin_key(Path(state.admin_key_file))}
    text = json_format.MessageToJson(config, preserving_proto_field_name=True)
    with http.InferenceServerClient(server.settings.http_url, network_timeout=60) as client:
        try:
            client.load_model("loaded", config=text, headers=header)
        except InferenceServerException as error:
            return str(error.message())
        taken = client.get_model_config("loaded", headers=header)
        client.unload_model("loaded", headers=header)
    assert taken["max_batch_size"] == config.max_batch_size
    return ""


SETTINGS = st.integers(1, 1024).flatmap(
    lambda largest: st.builds(
        ModelSettings,
        name=st.just("loaded"),
        profile=st.sampled_from(sorted(PROFILES)),
        max_batch_size=st.just(largest),
        max_queue_delay_us=st.none() | st.integers(0, 2**31 - 1),
        preferred_batch_sizes=st.lists(st.integers(1, largest), max_size=3).map(tuple),
        max_queue_size=st.integers(0, 2**31 - 1),
        default_timeout_us=st.integers(0, 2**31 - 1),
        priority_levels=st.integers(0, 2**31 - 1),
        instances=st.integers(0, 2),
        threads=st.integers(0, 4),
        response_cache=st.booleans(),
    )
)

NOOP = "class TritonPythonModel:\n    def execute(self, requests):\n        return [None] * len(requests)\n"


@pytest.fixture(scope="module")
def loadable(explicit: TritonServer) -> TritonServer:
    """The server with room for a model that starts at once, whatever its configuration."""
    version = explicit.settings.repository / "loaded" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(NOOP)
    return explicit


@settings(max_examples=25, deadline=None)
@given(chosen=SETTINGS)
def test_tritons_own_loader_takes_every_configuration(
    loadable: TritonServer, tiny_artefacts: Path, plan_artefacts: Path, chosen: ModelSettings
) -> None:
    config = model_config(Card.load(plan_artefacts if chosen.machine.on_gpu else tiny_artefacts), chosen)
    # The stub cannot answer the warm-up, which is tried in the tests of the server.
    del config.model_warmup[:]
    if chosen.machine.on_gpu:
        # This Triton has no such backend and sees no GPU; all the rest it takes.
        assert "unable to find backend library for backend 'tensorrt'" in accepted_by(loadable, config)
        config.backend, config.default_model_filename = "python", "model.py"
        for group in config.instance_group:
            group.kind = group.KIND_CPU
            del group.profile[:]
    assert accepted_by(loadable, config) == ""


@pytest.mark.parametrize("profile", ["v100", "gpu"])
def test_a_gpu_profile_serves_the_plan_and_nothing_in_python(
    profile: str, plan_artefacts: Path, tmp_path: Path
) -> None:
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2 as pb

    version = publish(plan_artefacts, tmp_path, ModelSettings(profile=profile)).path
    assert {path.name for path in version.iterdir()} == {"model.plan", "card.json", "config.pbtxt"}
    config = text_format.Parse((tmp_path / "unet" / "config.pbtxt").read_text(), pb.ModelConfig())
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert [(g.kind, g.count, list(g.profile)) for g in config.instance_group] == [
        (pb.ModelInstanceGroup.KIND_GPU, 2, ["0", "1"])
    ]
    assert {(w.batch_size, w.inputs["image"].dims[1]) for w in config.model_warmup} == {
        *((1, 204), (16, 204), (1, 252), (16, 252))
    }
    with pytest.raises(TritonError, match=r"wants the backend tensorrt, which this Triton lacks"):
        TritonServer(ServerSettings(tmp_path, tmp_path / "log", tmp_path / "state")).start()


def test_a_plan_for_another_gpu_is_refused(plan_artefacts: Path, tiny_artefacts: Path, tmp_path: Path) -> None:
    shutil.copytree(plan_artefacts, tmp_path / "artefacts")
    card = Card.load(tmp_path / "artefacts")
    card.artefacts["plan"] = dataclasses.replace(card.artefacts["plan"], facts={"compute_capability": "9.0"})
    card.save()
    with pytest.raises(RepositoryError, match=r"built for compute capability 9\.0, the profile is for 7\.0"):
        publish(tmp_path / "artefacts", tmp_path / "models", ModelSettings(profile="v100"))
    with pytest.raises(CardError, match=r"lists no model\.plan"):
        publish(tiny_artefacts, tmp_path / "models", ModelSettings(profile="gpu"))


def test_old_versions_are_removed(tiny_artefacts: Path, tmp_path: Path) -> None:
    for _ in range(4):
        publish(tiny_artefacts, tmp_path, ModelSettings(), keep=2)
    assert {path.name for path in (tmp_path / "unet").iterdir()} == {"3", "4", "config.pbtxt"}
    with pytest.raises(RepositoryError, match="keep is 0"):
        publish(tiny_artefacts, tmp_path, ModelSettings(), keep=0)


def test_the_umask_counts_for_all_that_is_published(tiny_artefacts: Path, tmp_path: Path) -> None:
    for umask, file, folder in ((0o077, 0o600, 0o700), (0o002, 0o664, 0o775)):
        former = os.umask(umask)
        try:
            published = publish(tiny_artefacts, tmp_path / oct(umask), ModelSettings())
        finally:
            os.umask(former)
        for path in (published.path, *published.path.rglob("*"), published.path.parent / "config.pbtxt"):
            assert path.stat().st_mode & 0o777 == (folder if path.is_dir() else file), path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_what_another_user_owns_is_left_and_does_not_undo_a_publication(
    tiny_artefacts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two users share a repository, and the second may not remove the first one's version."""
    with tempfile.TemporaryDirectory() as name:
        repository, artefacts = Path(name) / "models", Path(name) / "artefacts"
        publish(tiny_artefacts, repository, ModelSettings())
        shutil.copytree(tiny_artefacts, artefacts)
        for path in (Path(name), artefacts, repository / "unet"):
            path.chmod(0o777)
        os.seteuid(65534)
        try:
            second = publish(artefacts, repository, ModelSettings(), keep=1)
        finally:
            os.seteuid(0)
        assert second.version == 2
        assert sorted(path.name for path in (repository / "unet").iterdir()) == ["1", "2", "config.pbtxt"]
        assert "1 stays: Permission denied" in caplog.text


def test_rollback_brings_the_former_network_and_its_settings_back(
    tiny_artefacts: Path, other_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:

    def present() -> tuple[str, bytes]:
        """The batch size that the model's configuration names, and the newest version's own configuration."""
        text = (tmp_path / "unet" / "config.pbtxt").read_text(encoding="utf-8")
        newest = tmp_path / "unet" / str(versions_in(tmp_path / "unet")[-1])
        assert sha256_of(newest / "card.json") in text
        return text[text.index("max_batch_size") :].splitlines()[0], (newest / "config.pbtxt").read_bytes()

    publish(tiny_artefacts, tmp_path, ModelSettings(max_batch_size=3))
    with pytest.raises(RepositoryError, match="no version that differs from the present one"):
        rollback(tmp_path)
    publish(tiny_artefacts, tmp_path, ModelSettings(max_batch_size=3))
    first = present()
    publish(other_artefacts, tmp_path, ModelSettings(max_batch_size=5))
    second = present()
    assert (first[0], second[0]) == ("max_batch_size: 3", "max_batch_size: 5")
    assert main(["--rollback", "--model_repository", str(tmp_path)]) == 0
    assert f"{tmp_path / 'unet' / '4'}: version 4 of unet" in capsys.readouterr().out
    assert present() == first
    # Again is to and fro; a version can be named.
    assert (rollback(tmp_path).version, present()) == (5, second)
    assert (rollback(tmp_path, version=1).version, present()) == (6, first)
    for name, version, words in (("unet", 99, "is no version to go back to; there are 2, 3"), ("vnet", 1, "not exist")):
        with pytest.raises(RepositoryError, match=words):
            rollback(tmp_path, name, version)


def test_a_version_that_was_damaged_is_not_gone_back_to(
    tiny_artefacts: Path, other_artefacts: Path, tmp_path: Path
) -> None:
    old = publish(tiny_artefacts, tmp_path, ModelSettings())
    publish(other_artefacts, tmp_path, ModelSettings())
    (old.path / "model.fp16.onnx").write_bytes(b"damaged")
    with pytest.raises(CardError, match="is not the file that its card describes"):
        rollback(tmp_path)
    assert versions_in(tmp_path / "unet") == [1, 2]


def test_a_server_of_another_repository_is_left_alone(
    explicit: TritonServer, tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--artefacts", str(tiny_artefacts), "--model_repository", str(tmp_path / "models"), "--load"]
    assert main([*arguments, "--state_dir", str(explicit.settings.state_dir)]) == 2
    assert f"serves {explicit.settings.repository}, not {tmp_path / 'models'}" in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_loading_needs_a_server_with_model_control(
    triton_server: TritonServer, tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--artefacts", str(tiny_artefacts), "--model_repository", str(tmp_path / "models"), "--load"]
    for state_dir, words in (
        (tmp_path, "no server is running"),
        (triton_server.settings.state_dir, "start it with --model_control explicit"),
    ):
        assert main([*arguments, "--state_dir", str(state_dir)]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "models").exists()


def test_a_server_without_the_instructions_of_the_proof_serves_in_float32_and_says_so(
    tiny_artefacts: Path,
    settings_for: Callable[..., ServerSettings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(tiny_artefacts, tmp_path / "artefacts"))
    card = Card.load(folder)
    proof = Proof(sha256_of(folder / "model.fp16.onnx"), "cpu", ("avx2", "avx512", "vnni"))
    card.engine = Engine("openvino", "int8", "model.fp16.onnx", 2.0, proof)
    card.save()
    publish(folder, tmp_path / "models", ModelSettings())
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    with TritonServer(settings_for(tmp_path / "models")) as server:
        log = server.settings.log.read_text()
    assert log.count("openvino int8 was proven on a CPU with avx2, avx512, vnni, this one has avx2") == 1
    assert "onnxruntime f32 serves instead; export on this machine for the fastest engine" in log
