"""Malformed requests: ``python -m tests.torture.messages --inputs 20000 --out torture.md``.

Damaged gRPC messages to every method of the server's protocol and damaged HTTP requests go to a running server: right
messages of which some fields or bytes were changed, and bytes of no meaning. After every hundred a right request must
get its right answer. A server that has died is counted and started anew; it must answer rightly again.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped]
import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc import service_pb2

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.segment.connection import Connection
from serve.segment.errors import ClientError
from serve.segment.slot import Slot
from serve.segment.slots import make_slots
from serve.server.process import TritonServer
from serve.server.settings import ServerSettings
from tests.serve.conftest import artefacts_dividing_by
from tests.torture.mutate import mutated
from tests.torture.report import report
from unet.errors import say
from unet.processes import free_ports

_SIDE = 204
_LIMIT_S = 10.0
_AT_ONCE = 100
_WORDS = (
    "",
    "unet",
    "image",
    "probability",
    "UINT8",
    "FP16",
    "BYTES",
    "../../etc/passwd",
    "\x00",
    "9" * 400,
    "1",
    "-1",
)
_NUMBERS = (0, 1, -1, 2, 8, 9, _SIDE, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63))
_PATHS = (
    *("/v2/models/unet/infer", "/v2/models/unet/versions/1/infer", "/v2/models/unet/config", "/v2/models/unet/stats"),
    *("/v2/repository/index", "/v2/repository/models/unet/load", "/v2/repository/models/unet/unload"),
    *("/v2/systemsharedmemory/region/a/register", "/v2/cudasharedmemory/region/a/register", "/v2/logging"),
    *("/v2/trace/setting", "/v2/health/ready", "/v2/models/unet/trace/setting", "/v2/%2e%2e/x", "/"),
)
_BODY = (
    b'{"id": "1", "inputs": [{"name": "image", "shape": [1, 1, 204, 204], "datatype": "UINT8", "data": [1, 2], '
    b'"parameters": {"binary_data_size": 41616}}], "outputs": [{"name": "probability", "parameters": '
    b'{"binary_data": true, "shared_memory_region": "a", "shared_memory_byte_size": 99}}]}'
)


@dataclass
class Attacked:
    """What came of it.

    Attributes:
        sent: requests by kind.
        refused: of them, ended with an error or no answer.
        died: times that the server had to be started anew, each with the number of the last request before.
        faults: answers to right requests that were wrong or missing.
    """

    sent: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    died: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        """In one sentence."""
        kinds = ", ".join(f"{count:,} by {kind} ({self.refused[kind]:,} refused)" for kind, count in self.sent.items())
        return f"{self.sent.total():,} malformed requests: {kinds}; the server died {len(self.died)} times."


def grpc_message(rng: random.Random) -> tuple[str, bytes]:
    """A method, and a damaged message to it."""
    method = rng.choice(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods)
    if rng.random() < 0.6:
        method = method.containing_service.methods_by_name["ModelInfer"]
    message = getattr(service_pb2, method.input_type.name)()
    if method.name in ("ModelInfer", "ModelStreamInfer"):
        message.model_name, message.id = "unet", "1"
        message.inputs.add(name="image", datatype="UINT8", shape=[1, 1, _SIDE, _SIDE])
        message.outputs.add(name="probability")
        message.raw_input_contents.append(bytes(_SIDE * _SIDE))
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        change_field(message, rng)
    content = message.SerializeToString()
    if rng.random() < 0.3:
        content = mutated(content, rng) if content else rng.randbytes(rng.randrange(64))
    return method.name, content


def change_field(message: Any, rng: random.Random) -> None:
    """Give one field of a message, or of one within it, another value of its type."""
    one = rng.choice(message.DESCRIPTOR.fields or [None])
    if one is None:
        return
    if one.message_type is not None and one.message_type.GetOptions().map_entry:
        values = getattr(message, one.name)
        key = rng.choice((*_WORDS, "priority", "timeout", "sequence_id", "shared_memory_region", "classification"))
        if one.message_type.fields_by_name["value"].message_type is None:
            values[key] = rng.choice(_WORDS)
        else:
            change_field(values[key], rng)
    elif one.message_type is not None:
        inner = getattr(message, one.name)
        if one.label == FieldDescriptor.LABEL_REPEATED:
            inner = rng.choice(inner) if inner and rng.random() < 0.7 else inner.add()
        change_field(inner, rng)
    elif one.label == FieldDescriptor.LABEL_REPEATED:
        values = getattr(message, one.name)
        if values and rng.random() < 0.3:
            del values[rng.randrange(len(values)) :]
        with contextlib.suppress(ValueError, TypeError):
            values.append(value_of(one, rng))
    else:
        with contextlib.suppress(ValueError, TypeError):
            setattr(message, one.name, value_of(one, rng))


def value_of(one: Any, rng: random.Random) -> Any:
    """A value of a field's type, seldom a sensible one."""
    if one.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        return (
            rng.randbytes(rng.choice((0, 1, 7, 4096))) if one.type == FieldDescriptor.TYPE_BYTES else rng.choice(_WORDS)
        )
    if one.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    if one.cpp_type in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, float("nan"), float("inf")))
    return rng.choice(_NUMBERS)


def http_request(rng: random.Random) -> bytes:
    """A damaged HTTP request."""
    body = mutated(_BODY, rng, name="body.json") if rng.random() < 0.8 else rng.randbytes(rng.randrange(300))
    length = len(body) if rng.random() < 0.7 else rng.choice(_NUMBERS)
    lines = [
        f"{rng.choice(('POST', 'POST', 'GET', 'PUT', 'X'))} {rng.choice(_PATHS)} HTTP/1.1",
        "Host: localhost",
        f"Content-Length: {length}",
        "Connection: close",
    ]
    if rng.random() < 0.5:
        lines.append(f"Inference-Header-Content-Length: {rng.choice((length, *_NUMBERS))}")
    whole = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
    return mutated(whole, rng) if rng.random() < 0.2 else whole


def send_http(address: str, request: bytes) -> bool:
    """Send a request; whether the server took it."""
    host, port = address.rsplit(":", 1)
    try:
        with socket.create_connection((host, int(port)), _LIMIT_S) as connection:
            connection.sendall(request)
            # Without this a server waits for the rest of a body that was announced too long.
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(_LIMIT_S)
            return connection.recv(64).startswith(b"HTTP/1.1 2")
    except OSError:
        return False


def send_grpc(channel: grpc.Channel, method: str, message: bytes) -> bool:
    """Send a message; whether the server took it."""
    name = f"/inference.GRPCInferenceService/{method}"
    try:
        if method == "ModelStreamInfer":
            return bool(list(channel.stream_stream(name)(iter([message]), timeout=_LIMIT_S)))
        channel.unary_unary(name)(message, timeout=_LIMIT_S)
    except grpc.RpcError:
        return False
    return True


def right_answer(url: str) -> str:
    """What is wrong with the answer to a right request; empty if nothing is."""
    image = np.random.default_rng(0).integers(0, 256, (1, 1, _SIDE, _SIDE), np.uint8)
    try:
        connection = Connection(url, "unet", "", 30.0)
        try:
            slot = make_slots(connection, 1, (1, 1, _SIDE, _SIDE), Slot, insist=True)[0]
            slot.images[...] = image
            answer = slot.outputs(connection.infer(*slot.tensors(connection.grpc, 1)), 1)
        finally:
            connection.close()
    except ClientError as error:
        return f"no answer: {error}"
    due = image[..., 92:-92, 92:-92].astype(np.float16) * np.float16(1 / 255)
    return "" if np.array_equal(answer, due) else "another answer"


@contextlib.contextmanager
def server(folder: Path) -> Iterator[TritonServer]:
    """A running server, which may have died by the end of the block."""
    http, grpc_port, metrics = free_ports(3)
    folders = folder / "models", folder / "log", folder / "state"
    settings = ServerSettings(*folders, http, grpc_port, metrics, restarts=0)
    with TritonServer(settings) as running:
        yield running


def attack(inputs: int, campaign: int = 0, *, note: Callable[[str], None] = lambda text: None) -> Attacked:
    """Send so many malformed requests to a server of its own."""
    found = Attacked()
    with tempfile.TemporaryDirectory(prefix="unet-messages-") as name:
        folder = Path(name)
        publish(artefacts_dividing_by(folder / "made", 255), folder / "models", ModelSettings(max_batch_size=8))
        first = 0
        while first < inputs:
            with contextlib.suppress(ProcessLookupError), server(folder) as running:
                first = _until_it_dies(running, first, inputs, campaign, found, note)
    return found


def _until_it_dies(
    running: TritonServer, first: int, inputs: int, campaign: int, found: Attacked, note: Callable[[str], None]
) -> int:
    """Send the requests from ``first`` on; the first one that was not sent."""
    url = running.settings.grpc_url
    if problem := right_answer(url):
        found.faults.append(f"before request {first}: {problem}")
        return inputs
    with grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        while first < inputs:
            last = min(inputs, first + _AT_ONCE)
            for number in range(first, last):
                rng = random.Random(f"{campaign} {number}")
                kind = "HTTP" if number % 3 == 0 else "gRPC"
                took = (
                    send_http(running.settings.http_url, http_request(rng))
                    if kind == "HTTP"
                    else send_grpc(channel, *grpc_message(rng))
                )
                found.sent[kind] += 1
                found.refused[kind] += not took
            first = last
            if problem := right_answer(url):
                if problem == "another answer":
                    found.faults.append(f"after request {first}: {problem}")
                found.died.append(first)
                note(f"after request {first}: {problem}; started anew")
                break
            if first % 1000 == 0:
                note(f"{first:,} of {inputs:,} malformed requests, {len(found.died)} times started anew")
    return first


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if a right request got no right answer."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.messages", description="Malformed requests.")
    parser.add_argument("--inputs", type=int, default=20_000, help="how many (default: 20000)")
    parser.add_argument("--campaign", type=int, default=0, help="the number that all damage follows from (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the counts are added to this file")
    chosen = parser.parse_args(argv)
    found = attack(chosen.inputs, chosen.campaign, note=say)
    lines = ["", "# Malformed requests", "", found.line(), "", *(f"- {fault}" for fault in found.faults)]
    return report(lines, chosen.out, found.faults)


if __name__ == "__main__":
    sys.exit(main())
