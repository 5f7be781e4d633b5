from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serve import doctor
from serve.doctor import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server import offers
from serve.server.offers import Finding
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.cards import rewrite_card
from unet.card import Card
from unet.card.records import Engine, Proof
from unet.machine import Gpu, instruction_sets, parse_gpus

ROOT = Path(__file__).resolve().parents[3]
V100 = "Tesla V100-SXM2-16GB, 535.183.01, 7.0, 16384"


def lines(said: str) -> dict[str, str]:
    """The report's lines by their item."""
    return {line[7:26].strip(): line for line in said.splitlines()}


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose programs are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def driver_that_says(folder: Path, said: str) -> None:
    """There is no NVIDIA driver where the tests run: a program in its place says what one says."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\n")
    program.chmod(0o755)


def test_every_item_has_one_line(tiny_artefacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--artefacts", str(tiny_artefacts), "--state_dir", str(tmp_path / "cache")]
    code = main(arguments)
    said = capsys.readouterr().out
    found = lines(said)
    assert list(found) == [
        *("Python", "packages", "CPU", "CPU engines", "GPU", "driver", "compute capability", "TensorRT", "Triton"),
        *("perf_analyzer", "TensorFlow", "Horovod", "Docker", "/dev/shm", "server", "artefacts"),
    ]
    # What the tests themselves need is here.
    for item in ("Python", "CPU engines", "Triton", "perf_analyzer", "TensorFlow", "/dev/shm", "artefacts"):
        assert found[item].startswith("ok"), found[item]
    assert code == int("\nwrong" in said)
    assert main([*arguments, "--json"]) == code
    assert [entry["item"] for entry in json.loads(capsys.readouterr().out)] == list(found)


def bare(*words: str) -> subprocess.CompletedProcess[str]:
    """A script of the project on a Python that has nothing but its standard library."""
    line = [sys.executable, "-I", "-S", *words]
    return subprocess.run(line, cwd=ROOT, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)


def test_without_an_installation_missing_packages_are_findings(tmp_path: Path) -> None:
    done = bare("serve/doctor.py", "--state_dir", str(tmp_path))
    assert (done.returncode, done.stderr) == (1, "")
    found = lines(done.stdout)
    assert found["Python"].startswith("ok")
    assert found["packages"].startswith("wrong  packages           missing: numpy, PIL, psutil")
    for item in ("CPU engines", "Triton"):
        assert found[item].startswith("wrong"), found[item]
    assert "make install" in found["CPU engines"]


def test_without_an_installation_a_server_is_stopped_and_seen(
    tiny_artefacts: Path, settings_for: Callable[[Path], ServerSettings], tmp_path: Path
) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings())
    server = TritonServer(settings_for(tmp_path / "models"))
    server.start()
    pid = server.pid
    server.detach()
    state_dir = str(server.settings.state_dir)
    assert f"process {pid}, gRPC {server.settings.grpc_url}" in bare("serve/doctor.py", "--state_dir", state_dir).stdout
    assert bare("serve/triton.py", "stop", "--state_dir", state_dir).stdout == "stopped\n"
    assert bare("serve/triton.py", "stop", "--state_dir", state_dir).stdout == "no server is running\n"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("fpu avx2 avx512bw avx512_vnni avx512_bf16", "trains in bfloat16, it serves natively in bf16 and int8"),
        ("fpu avx2 avx_vnni", "trains in float32, it serves natively in int8"),
        ("fpu avx2", "trains in float32, it serves in f32, at about half the speed"),
    ],
)
def test_the_instructions_and_what_follows_are_named(
    flags: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(offers, "instruction_sets", lambda: instruction_sets(tmp_path / "cpuinfo"))
    dtype = "bfloat16" if "avx512_bf16" in flags else "float32"
    monkeypatch.setattr(offers, "cpu_amp_dtype", lambda: dtype)
    assert words in str(offers.look_at_cores())


def test_no_driver_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    gpus, findings = offers.look_at_gpus()
    assert gpus == []
    assert [finding.state for finding in findings] == ["absent"] * 3
    assert "--profile" not in str(findings[0])
    assert "the CPU profile needs none" in str(findings[0])


@pytest.mark.parametrize(
    ("said", "states", "words"),
    [
        (V100, ["ok", "ok", "ok"], "--target v100, --profile v100; TensorRT 10.4.0 and Triton 24.09"),
        ("NVIDIA H100 80GB HBM3, 550.54.15, 9.0, 81559", ["ok"] * 3, "--target h100, --profile gpu; TensorRT 10.4.0"),
        ("Tesla P100-PCIE-16GB, 550.54.15, 6.0, 16384", ["ok", "ok", "wrong"], "use --profile cpu"),
        ("Tesla M60, 470.82.01, 5.2, 8192", ["ok", "wrong", "wrong"], "use --profile cpu"),
    ],
)
def test_a_gpu_is_judged_by_driver_and_compute_capability(said: str, states: list[str], words: str, tool: Path) -> None:
    driver_that_says(tool, said)
    gpus, findings = offers.look_at_gpus()
    assert len(gpus) == 1
    assert [finding.state for finding in findings] == states
    assert words in str(findings[-1])


@pytest.mark.parametrize(
    ("version", "state", "words"),
    [
        ("10.4.0", "ok", ""),
        ("10.13.2", "wrong", "Triton 24.09 loads plans of 10.4.0 alone"),
        ("8.6.1", "wrong", "10.4.0"),
    ],
)
def test_a_tensorrt_whose_plans_no_triton_here_loads_is_wrong(
    version: str, state: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.server.offers.metadata.version", lambda package: version)
    found = offers.look_at_tensorrt([])
    assert (found.state, found.fact) == (state, version)
    assert words in found.remedy


def test_horovod_without_nccl_is_wrong_where_there_are_gpus() -> None:
    found = offers.look_at_horovod(gpu=True)
    if found.state == "absent":
        pytest.skip("Horovod is not installed")
    assert ("NCCL" in found.fact) == (found.state == "ok")


def test_a_horovod_that_takes_too_long_to_load_is_not_called_a_useless_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "_HOROVOD_TIMEOUT_S", 0.01)
    found = offers.look_at_horovod(gpu=False)
    if found.state == "absent":
        pytest.skip("Horovod is not installed")
    assert "does not load within" in found.fact
    assert "import horovod.tensorflow" in found.remedy


@pytest.mark.parametrize(
    ("capability", "gpus", "state", "words"),
    [
        ("7.0", parse_gpus(V100), "ok", "plan for compute capability 7.0"),
        ("9.0", parse_gpus(V100), "wrong", "this machine has 7: build the plan here"),
        ("7.0", [], "absent", "there is no GPU here"),
    ],
)
def test_a_plan_is_compared_with_the_gpu(
    capability: str, gpus: list[Gpu], state: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "model.plan").write_bytes(b"a plan")
    card = Card(tmp_path)
    card.record("plan", tmp_path / "model.plan", None, "tests", compute_capability=capability)
    card.save()
    found = doctor.look_at_card(tmp_path, gpus)
    assert found.state == state
    assert words in str(found)


def test_what_the_demo_made_is_looked_at_where_nothing_else_is_named(
    tiny_artefacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_artefacts, tmp_path / "demo" / "artefacts")
    monkeypatch.chdir(tmp_path)
    main(["--json"])
    (found,) = (one for one in json.loads(capsys.readouterr().out) if one["item"] == "artefacts")
    assert found["fact"].startswith("demo/artefacts: ")


def test_artefacts_that_serve_nothing_are_told(tiny_artefacts: Path, tmp_path: Path) -> None:
    assert "does not exist" in str(doctor.look_at_card(tmp_path, []))
    shutil.copytree(tiny_artefacts, tmp_path / "artefacts")
    card = tmp_path / "artefacts" / "card.json"
    rewrite_card(card.parent, engine=None)
    assert "no engine for a CPU and no plan" in str(doctor.look_at_card(card.parent, []))


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_an_engine_that_was_proven_on_such_a_processor_fits(precision: str, tmp_path: Path) -> None:
    card = Card(tmp_path)
    card.tile_sizes = (204,)
    card.engine = Engine("openvino", precision, "model", 1.0, Proof("", "cpu", instruction_sets()))
    card.save()
    found = doctor.look_at_card(tmp_path, [])
    assert (found.state, found.remedy) == ("ok", "")
    assert f"openvino {precision}" in found.fact


def test_an_engine_that_was_proven_on_another_processor_is_told(tmp_path: Path) -> None:
    other = () if {"vnni", "amx"} & set(instruction_sets()) else ("vnni",)
    card = Card(tmp_path)
    card.engine = Engine("openvino", "int8", "model", 1.0, Proof("", "cpu", other))
    card.save()
    assert "was proven on a CPU with other instructions" in str(doctor.look_at_card(tmp_path, []))
    card.fallback = Engine("openvino", "f32", "model", 1.0, Proof("", "cpu", other))
    card.save()
    found = doctor.look_at_card(tmp_path, [])
    assert found.state == "wrong"
    assert "not proven on such a CPU, openvino f32 serves" in found.remedy


def test_a_line_says_what_to_do() -> None:
    assert str(Finding("Thing", "wrong", "broken", "mend it")) == "wrong  Thing              broken; mend it"
    assert str(Finding("Thing", "ok", "1.0")) == "ok     Thing              1.0"
