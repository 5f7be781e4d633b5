"""One trace shows where the time of a run goes, on both sides: taken by a receiver of OTLP over HTTP that runs here."""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from serve.client import main
from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.install import TritonError
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from unet import tracing

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
CLIENTS = {"segment", "find window", "read", "window", "cut", "request", "write", "publish"}


@dataclass(frozen=True)
class Seen:
    """A span as it came."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    start_ns: int
    end_ns: int
    attributes: dict[str, str]
    failed: bool
    events: dict[str, int]


class Collector(ThreadingHTTPServer):
    """Takes spans in OTLP's two encodings: the client sends protobuf, Triton JSON."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.spans: queue.Queue[Seen] = queue.Queue()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def wait_for(self, enough: Callable[[list[Seen]], bool], timeout_s: float = 60) -> list[Seen]:
        found: list[Seen] = []
        end = time.monotonic() + timeout_s
        while not enough(found):
            found.append(self.spans.get(timeout=max(0.01, end - time.monotonic())))
        return found


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        spans = _json_spans(body) if "json" in self.headers["Content-Type"] else _protobuf_spans(body)
        if self.path == "/v1/traces" and self.server.status == 200:
            for span in spans:
                self.server.spans.put(span)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - http.server's own name
        """Nothing."""


def _json_spans(body: bytes) -> Iterator[Seen]:
    for resource in json.loads(body)["resourceSpans"]:
        service = {entry["key"]: entry["value"] for entry in resource["resource"]["attributes"]}["service.name"]
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                about = {one["key"]: str(next(iter(one["value"].values()))) for one in span.get("attributes", [])}
                ends = int(span["startTimeUnixNano"]), int(span["endTimeUnixNano"])
                ids = span["traceId"], span["spanId"], span.get("parentSpanId", "")
                events = {one["name"]: int(one["timeUnixNano"]) for one in span.get("events", [])}
                yield Seen(service["stringValue"], span["name"], *ids, *ends, about, False, events)


def _protobuf_spans(body: bytes) -> Iterator[Seen]:
    request = trace_service.ExportTraceServiceRequest.FromString(body)
    for resource in request.resource_spans:
        service = {entry.key: entry.value.string_value for entry in resource.resource.attributes}["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                about = {one.key: str(one.value.string_value or one.value.int_value) for one in span.attributes}
                ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
                ends = span.start_time_unix_nano, span.end_time_unix_nano
                events = {one.name: one.time_unix_nano for one in span.events}
                yield Seen(service, span.name, *ids, *ends, about, span.status.code == 2, events)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def stack(tmp_path: Path) -> Path:
    path = tmp_path / "v.tif"
    tifffile.imwrite(path, np.random.default_rng(1).integers(0, 256, (3, 60, 70), np.uint8), photometric="minisblack")
    return path


def test_one_trace_goes_from_reading_through_the_server_to_writing(
    collector: Collector,
    tiny_artefacts: Path,
    settings_for: Callable[..., ServerSettings],
    stack: Path,
    tmp_path: Path,
) -> None:
    publish(tiny_artefacts, tmp_path / "models", ModelSettings(max_batch_size=8))
    with TritonServer(settings_for(tmp_path / "models", otlp=collector.url)) as server:
        line = [str(stack), "--url", server.settings.grpc_url, "--quiet", "--run_id", "mine", "--otlp", collector.url]
        assert main(line) == 0

        def enough(found: list[Seen]) -> bool:
            traces = [one.trace for one in found if one.name == "segment"]
            return sum(one.name == "InferRequest" and one.trace in traces for one in found) == 3

        found = collector.wait_for(enough)
    (root,) = [one for one in found if one.name == "segment"]
    assert (root.service, root.parent) == ("unet-client", "")
    assert (root.attributes["volume"], root.attributes["run"]) == ("v.tif", "mine")
    ours = [one for one in found if one.service == "unet-client"]
    assert {one.name for one in ours} == CLIENTS
    assert {one.trace for one in ours} == {root.trace}
    assert all(one.parent == root.span for one in ours if one is not root)
    assert all(root.start_ns <= one.start_ns <= one.end_ns <= root.end_ns for one in ours)
    by_id = {one.span: one for one in found}
    # Other requests, such as those that look whether the server is ready, have traces of their own.
    theirs = [one for one in found if one.service == "triton" and one.trace == root.trace]
    models = [one for one in theirs if one.name == "unet"]
    ids = {one.attributes["triton.request_id"] for one in models}
    assert len(ids) == len(models) == 3
    assert all(one.startswith("mine-") for one in ids)
    for model in models:
        received = by_id[model.parent]
        assert received.name == "InferRequest"
        request = by_id[received.parent]
        assert (request.name, request.attributes["server"]) == ("request", server.settings.grpc_url)
        (computing,) = [one for one in theirs if one.parent == model.span]
        assert computing.name == "compute"
        # Triton and its python backend take the later times after the answer was sent, when the client may have it.
        times = [request.start_ns, model.start_ns, computing.start_ns, computing.events["COMPUTE_INPUT_END"]]
        assert [*times, request.end_ns] == sorted([*times, request.end_ns])
        assert computing.end_ns <= model.end_ns


def test_a_request_that_fails_says_so_in_its_trace(collector: Collector) -> None:
    with tracing.recording(collector.url, "service", pytest.fail):
        tracing.begin("request", server="one").end(TritonError("the queue is full"))
        tracing.begin("request", server="other").end()
    found = collector.wait_for(lambda found: len(found) == 2)
    assert {one.attributes["server"]: one.failed for one in found} == {"one": True, "other": False}


@pytest.mark.parametrize("status", [None, 400])
def test_a_collector_that_takes_nothing_costs_no_result(
    collector: Collector,
    triton_server: TritonServer,
    stack: Path,
    capsys: pytest.CaptureFixture[str],
    status: int | None,
) -> None:
    url = "http://127.0.0.1:1"
    if status is not None:
        collector.status, url = status, collector.url
    assert main([str(stack), "--url", triton_server.settings.grpc_url, "--quiet", "--otlp", url]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [
        f"warning: the collector at {url}/v1/traces did not take all of the trace: see whether it runs and takes OTLP "
        "over HTTP"
    ]
    assert stack.with_name("v-probability.tif").exists()


def test_an_address_that_is_none_is_refused_on_both_sides(
    triton_server: TritonServer, stack: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    line = [str(stack), "--url", triton_server.settings.grpc_url, "--otlp", "localhost:4318"]
    assert main(line) == 2
    assert "error: --otlp localhost:4318 is no address of a collector" in capsys.readouterr().err
    assert not stack.with_name("v-probability.tif").exists()
    with pytest.raises(TritonError, match="--otlp grpc://h:1 is no address of a collector: give one like http://"):
        ServerSettings(tmp_path, tmp_path / "log", tmp_path, otlp="grpc://h:1")


def test_without_opentelemetry_it_says_what_to_install(
    triton_server: TritonServer, stack: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    line = [str(stack), "--url", triton_server.settings.grpc_url, "--otlp", "http://localhost:4318"]
    assert main(line) == 2
    assert capsys.readouterr().err.endswith("`pip install '.[otlp]'` brings it\n")


def test_nothing_is_recorded_unless_it_is_asked_for() -> None:
    first = tracing.begin("one")
    assert first is tracing.begin("two")
    assert first.headers == {}
    first.end()
    with tracing.span("three"), tracing.recording("", "service", pytest.fail):
        assert tracing.begin("four") is first


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://localhost:4318", "http://localhost:4318/v1/traces"),
        ("https://host/", "https://host/v1/traces"),
        ("http://host:1/own/path", "http://host:1/own/path"),
    ],
)
def test_the_path_of_the_protocol_is_added_where_there_is_none(given: str, found: str) -> None:
    assert tracing.traces_url(given) == found
