"""The container parts, checked by the tools that need no Docker, and their start command run on the wheel's Triton."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.command_line import Identity, server_command
from serve.server.install import find_installation
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from serve.server.state import answers_ready
from unet.processes import child, free_ports

BIN = Path(sys.executable).parent
DOCKER = Path(__file__).resolve().parents[3] / "docker"
DASHBOARD = DOCKER / "grafana" / "dashboards" / "unet.json"
# Where there is no GPU, Triton does not export these.
GPU_METRICS = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "nv_gpu_memory_total_bytes"}


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((DOCKER / name).read_text(encoding="utf-8")))


def run(*words: str | Path, folder: Path = DOCKER) -> str:
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["Dockerfile.train", "Dockerfile.serve", "Dockerfile.client"])
def test_hadolint_has_nothing_to_say(name: str) -> None:
    assert run(BIN / "hadolint", "--config", DOCKER.parent / ".hadolint.yaml", DOCKER / name) == ""


@pytest.mark.parametrize("name", ["Dockerfile.train", "Dockerfile.serve", "Dockerfile.client"])
def test_images_copy_what_there_is_and_run_as_an_ordinary_user(name: str) -> None:
    text = (DOCKER / name).read_text(encoding="utf-8")
    for sources in re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (DOCKER.parent / source).exists(), source
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)
    assert "\nUSER 1000:1000" in stages[-1]


def test_images_have_the_versions_of_this_project() -> None:
    constraints = (DOCKER.parent / "constraints.txt").read_text(encoding="utf-8")
    assert "\ntensorflow==2.15.1 " in constraints
    train = (DOCKER / "Dockerfile.train").read_text(encoding="utf-8")
    makefile = (DOCKER.parent / "Makefile").read_text(encoding="utf-8")
    horovod = re.search(r"^HOROVOD := (\S+)$", makefile, re.MULTILINE)
    assert horovod is not None
    assert f"horovod=={horovod[1]}" in train


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_compose_takes_the_file_and_opens_nothing_to_the_network(profile: str) -> None:
    text = run(BIN / "docker-compose", "-f", "compose.yaml", "--profile", profile, "config", "--format", "json")
    services = json.loads(text)["services"]
    assert set(services) == {f"triton-{profile}", "prometheus", "grafana"}
    for service in services.values():
        assert {port["host_ip"] for port in service["ports"]} == {"127.0.0.1"}
        assert service["cap_drop"] == ["ALL"]
        assert "privileged" not in service
        for volume in service["volumes"]:
            assert volume["type"] == "volume" or Path(volume["source"]).exists()
    triton = services[f"triton-{profile}"]
    assert [port["target"] for port in triton["ports"]] == [8001]
    assert (triton["read_only"], triton["user"]) == (True, "1000:1000")


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    return found


def test_promtool_takes_the_configuration_and_the_rules_do_what_they_say(promtool: str) -> None:
    run(promtool, "check", "config", "prometheus/prometheus.yml")
    run(promtool, "test", "rules", "prometheus/rules.test.yml")


def test_promtool_takes_the_dashboards_expressions(promtool: str, tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(promtool, "check", "rules", tmp_path / "rules.yml")


def expressions() -> list[str]:
    """What the dashboard asks Prometheus for."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    (source,) = documents("grafana/provisioning/datasources/prometheus.yaml")[0]["datasources"]
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        assert panel["datasource"]["uid"] == source["uid"]
        assert panel["targets"]
    corners = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(corners)) == len(panels)
    recorded = {rule["record"] for rule in recorded_rules()}
    assert set(re.findall(r"unet:\w+", " ".join(expressions()))) <= recorded
    # compose.yaml mounts the dashboards where provisioning looks for them.
    (provider,) = documents("grafana/provisioning/dashboards/unet.yaml")[0]["providers"]
    mounted = documents("compose.yaml")[0]["services"]["grafana"]["volumes"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in mounted


def recorded_rules() -> list[Any]:
    (group,) = documents("prometheus/rules.yml")[0]["groups"]
    return [rule for rule in group["rules"] if "record" in rule]


def test_every_metric_that_is_asked_for_is_one_of_this_server(triton_server: TritonServer) -> None:
    url = f"http://127.0.0.1:{triton_server.settings.metrics_port}/metrics"
    with urllib.request.urlopen(url) as answer:
        exported = set(re.findall(r"^# TYPE (\w+) ", answer.read().decode(), re.MULTILINE))
    asked = set()
    for path in (DASHBOARD, DOCKER / "prometheus" / "rules.yml", DOCKER / "helm" / "adapter-values.yaml"):
        asked |= set(re.findall(r"nv_\w+", path.read_text(encoding="utf-8")))
    assert "nv_inference_queue_duration_us" in asked
    assert asked - GPU_METRICS <= exported


# Each is a way to install the chart, and the kinds that it makes beside the server's own.
CHARTS: dict[str, tuple[list[str], set[str]]] = {
    "cpu": ([], set()),
    "gpu": (
        ["device=gpu", "autoscaling.kind=hpa", "metrics.serviceMonitor=true"],
        {"HorizontalPodAutoscaler", "ServiceMonitor"},
    ),
    "keda": (["autoscaling.kind=keda", "model.source=url", "model.url=:s3:bucket/models"], {"ScaledObject"}),
    "locked": (
        [
            "tls.secret=tls",
            "tls.clientCertificates=true",
            "adminKeySecret=admin",
            "model.source=claim",
            "model.claim=m",
        ],
        set(),
    ),
}
KINDS = {"Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget"}


@pytest.fixture(scope="module")
def helm() -> str:
    found = shutil.which("helm", path=f"{DOCKER.parent / '.cache' / 'helm'}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("Helm is not installed (make install-helm)")
    return found


def rendered(helm: str, values: list[str]) -> dict[str, Any]:
    """What the chart makes of some values, by kind."""
    flags = [word for value in values for word in ("--set", value)]
    made = yaml.safe_load_all(run(helm, "template", "cells", "helm/unet-serve", *flags))
    return {document["kind"]: document for document in made}


@pytest.mark.parametrize("way", CHARTS)
def test_the_chart_is_taken_by_helm_and_by_kubernetes(helm: str, way: str) -> None:
    import kubernetes_validate

    values, kinds = CHARTS[way]
    run(helm, "lint", "--strict", "helm/unet-serve", *(word for value in values for word in ("--set", value)))
    made = rendered(helm, values)
    assert set(made) == KINDS | kinds
    for version in ("1.29", "1.37"):
        for document in made.values():
            if not document["apiVersion"].startswith(("keda.sh", "monitoring.coreos.com")):
                kubernetes_validate.validate(document, version, strict=True)
    # Nothing outside the release's namespace is touched.
    assert all("namespace" not in document["metadata"] for document in made.values())
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"unet-serve:{'gpu' if way == 'gpu' else 'cpu'}"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (way == "gpu")


@pytest.mark.parametrize("value", ["device=tpu", "model.source=url", "model.source=claim", "replicas=0", "typo=1"])
def test_the_chart_refuses_values_that_it_has_not(helm: str, value: str) -> None:
    done = subprocess.run(
        [helm, "template", "cells", "helm/unet-serve", "--set", value], cwd=DOCKER, capture_output=True, check=False
    )
    assert done.returncode != 0


def test_the_charts_parts_fit_each_other(helm: str) -> None:
    made = rendered(helm, CHARTS["gpu"][0])
    pod = made["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert made["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert made["Service"]["spec"]["selector"] == labels
    assert made["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert made["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"] == labels
    assert (
        made["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        <= made["Service"]["metadata"]["labels"].items()
    )
    assert made["ServiceMonitor"]["spec"]["endpoints"][0]["port"] in {
        port["name"] for port in made["Service"]["spec"]["ports"]
    }
    (metric,) = made["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (rule,) = documents("helm/adapter-values.yaml")[0]["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    # The budget must let a node be emptied.
    assert made["HorizontalPodAutoscaler"]["spec"]["minReplicas"] > made["PodDisruptionBudget"]["spec"]["minAvailable"]


def test_compose_the_chart_and_kserve_agree(helm: str) -> None:
    """On images, ports, the user, the repository's place and the health that is asked for."""
    script = (DOCKER / "serve.sh").read_text(encoding="utf-8")
    compose = documents("compose.yaml")[0]["services"]["triton-cpu"]
    made = rendered(helm, CHARTS["locked"][0])
    (container,) = made["Deployment"]["spec"]["template"]["spec"]["containers"]
    runtime, service = documents("kserve/unet.yaml")
    (served,) = runtime["spec"]["containers"]
    assert container["image"] == served["image"] == compose["image"]
    assert {port["containerPort"] for port in container["ports"]} == {8001, 8002}
    assert [port["containerPort"] for port in served["ports"]] == [8001]
    assert container["readinessProbe"]["exec"] == served["readinessProbe"]["exec"]
    variables = {one["name"]: one["value"] for one in container["env"]}
    assert set(variables) == {"TLS_CERT", "TLS_KEY", "TLS_CLIENT_CA", "ADMIN_KEY_FILE", "MODELS"}
    assert all(f"${name}" in script or f"${{{name}:-" in script for name in variables)
    assert compose["volumes"] == [f"../model_repository:{variables['MODELS']}:ro"]
    assert {"name": "MODELS", "value": "/mnt/models"} in served["env"]
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]
    # KServe's own kinds have no published schema; their containers are Kubernetes'.
    import kubernetes_validate

    spec = {"containers": runtime["spec"]["containers"], "volumes": runtime["spec"]["volumes"]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "runtime"}, "spec": spec}
    kubernetes_validate.validate(pod, "1.37", strict=True)


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_takes_the_training_job(version: str) -> None:
    import kubernetes_validate

    # The job itself is of the MPI Operator's kind; its pods are Kubernetes' own.
    (job,) = documents("kubernetes/train.yaml")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    assert set(job["spec"]) == {"slotsPerWorker", "sshAuthMountPath", "runPolicy", "mpiReplicaSpecs"}
    for role, replicas in job["spec"]["mpiReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}, **replicas["template"]}
        kubernetes_validate.validate(pod, version, strict=True)


def test_the_job_trains_with_flags_that_there_are() -> None:
    (job,) = documents("kubernetes/train.yaml")
    command = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["command"]
    script = command.index("train/main.py")
    known = run(sys.executable, "train/main.py", "--help", folder=DOCKER.parent)
    for flag in (word for word in command[script:] if word.startswith("--")):
        assert flag in known


@pytest.mark.parametrize("version", ["1.29", "1.37"])
def test_kubernetes_takes_the_job_of_shards(version: str) -> None:
    import kubernetes_validate

    (job,) = documents("kubernetes/segment.yaml")
    kubernetes_validate.validate(job, version, strict=True)
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    (container,) = spec["template"]["spec"]["containers"]
    assert f"$(JOB_COMPLETION_INDEX)/{spec['completions']}" in container["command"]
    known = run(sys.executable, "serve/client.py", "--help", folder=DOCKER.parent)
    assert all(word in known for word in container["command"] if word.startswith("--"))


def test_slurms_array_does_a_volume_and_a_second_pass_what_is_missing(
    triton_server: TritonServer, tmp_path: Path
) -> None:
    """The batch file by bash, with the variables that Slurm sets."""
    import numpy as np
    import zarr

    script = DOCKER / "slurm" / "segment.sbatch"
    text = script.read_text(encoding="utf-8")
    assert re.search(r"^#SBATCH --array=0-99$", text, re.MULTILINE)
    assert "${SHARES:-100}" in text
    if checker := shutil.which("shellcheck"):
        run(checker, "--exclude=SC1090,SC1091", script)
    zarr.create_array(str(tmp_path / "v.zarr"), data=np.arange(3 * 40 * 40, dtype=np.uint8).reshape(3, 40, 40))
    words = ["bash", script, tmp_path / "v.zarr", "--url", triton_server.settings.grpc_url, "--shard_mpx", "0.001"]
    environment = {**os.environ, "SHARES": "2", "PATH": f"{BIN}:{os.environ['PATH']}", "UNET_ENV": "none"}
    for task in ("1", "1", "0"):
        assert not (tmp_path / "v-mask.zarr").exists()
        environment["SLURM_ARRAY_TASK_ID"] = task
        subprocess.run([*map(str, words), "--output", "mask"], env=environment, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v-mask.zarr", "v.zarr"]


@contextlib.contextmanager
def started(folder: Path, models: Path, **variables: str) -> Iterator[int]:
    """``docker/serve.sh`` with the wheel's Triton in the place of the container's; yields its HTTP port."""
    installation = find_installation(folder)
    programs = folder / "bin"
    programs.mkdir()
    (programs / "tritonserver").write_text(
        f'#!/bin/sh\nexec {installation.server} --backend-directory={installation.backends} "$@"\n'
    )
    (programs / "tritonserver").chmod(0o755)
    http, grpc, metrics = free_ports(3)
    # The container's gRPC and metrics listen on every address of its own network.
    flags = [f"--{name}-address=127.0.0.1" for name in ("grpc", "metrics")]
    ports = [f"--http-port={http}", f"--grpc-port={grpc}", f"--metrics-port={metrics}"]
    environment = installation.environment({**os.environ, "MODELS": str(models), **variables})
    environment["PATH"] = f"{environment['PATH'].split(os.pathsep)[0]}{os.pathsep}{programs}:/usr/bin:/bin"
    line = [str(DOCKER / "serve.sh"), *flags, *ports, "--backend-config=python,shm-region-prefix-name=unet-triton-sh-"]
    with child(line, log=folder / "log", environment=environment) as process:
        while not answers_ready("127.0.0.1", http, ["unet"], "triton", key=""):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                raise AssertionError((folder / "log").read_text())
        yield http


def status_of(http: int, path: str, headers: dict[str, str] | None = None, body: bytes | None = None) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{http}{path}", body, headers or {})
    try:
        with urllib.request.urlopen(request) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_containers_start_command_serves_and_locks_administration(tiny_artefacts: Path, tmp_path: Path) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings())
    (tmp_path / "key").write_text("k" * 32)
    with started(tmp_path, tmp_path / "models", ADMIN_KEY_FILE=str(tmp_path / "key")) as http:
        assert status_of(http, "/v2/models/unet/config") == 200
        assert status_of(http, "/v2/repository/index", body=b"{}") == 403
        assert status_of(http, "/v2/repository/index", {"admin-key": "k" * 32}, b"{}") == 200
        assert status_of(http, "/v2/systemsharedmemory/status") == 403
        # SageMaker's protocol, which goes round the key in this release, is off.
        assert status_of(http, "/models") == 404


def test_the_container_is_started_as_the_server_here_is(tmp_path: Path) -> None:
    script = (DOCKER / "serve.sh").read_text(encoding="utf-8")
    settings = ServerSettings(Path("models"), Path("log"), Path("state"), address="0.0.0.0")
    installation = find_installation(tmp_path)
    flags = server_command(settings, installation, Identity("id", "", tmp_path, tmp_path), ["unet"], "KEY" * 8)
    for flag in flags[1:]:
        name = flag.partition("=")[0]
        if name.endswith(("-address", "-port", "-directory", "-repository", "-config", "-size", "-metrics", "--id")):
            continue
        if name in ("--grpc-restricted-protocol", "--http-restricted-api"):
            locked = set(flag.partition("=")[2].partition(":")[0].split(","))
            assert locked <= {"model-repository", "trace", "logging", "shared-memory"}
            assert f'"{name}=$' in script
        else:
            assert f"    {flag} \\" in script, flag
