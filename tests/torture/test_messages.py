"""Malformed requests to the running server; twenty thousand of them by `make torture`."""

from __future__ import annotations

import random
from pathlib import Path

from tritonclient.grpc import service_pb2

from serve.models.config import ModelSettings
from serve.models.publish import publish
from tests.serve.conftest import artefacts_dividing_by
from tests.torture.messages import attack, grpc_message, http_request, right_answer, server


def test_a_server_answers_rightly_after_malformed_requests() -> None:
    found = attack(300)
    assert (found.faults, found.died) == ([], [])
    assert found.sent == {"HTTP": 100, "gRPC": 200}
    # Most of them are refused, and some are harmless: else the damage is no damage, or all of it is noise.
    assert all(0.3 < found.refused[kind] / count < 1 for kind, count in found.sent.items())


def test_every_method_is_tried_and_damage_can_be_repeated() -> None:
    methods = {grpc_message(random.Random(number))[0] for number in range(2000)}
    assert methods == set(service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)
    for make in (grpc_message, http_request):
        assert make(random.Random(7)) == make(random.Random(7)) != make(random.Random(8))


def test_another_answer_and_none_are_told(tmp_path: Path) -> None:
    publish(artefacts_dividing_by(tmp_path / "made", 510), tmp_path / "models", ModelSettings(max_batch_size=8))
    with server(tmp_path) as running:
        url = running.settings.grpc_url
        assert right_answer(url) == "another answer"
    assert right_answer(url).startswith("no answer: ")
