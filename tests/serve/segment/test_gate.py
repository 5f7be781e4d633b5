"""The gate of answers by gRPC, with Triton's own messages and without a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from serve import ServerError
from serve.segment.answer import probabilities
from serve.segment.connection import Connection
from serve.segment.errors import Action
from serve.segment.slot import Slot

# Of two tiles of 204 x 204, and room for three.
SHAPE = (2, 1, 20, 20)
VALUES = np.random.default_rng(2).random(SHAPE).astype(np.float16)
SAID = "127.0.0.1:1 answered with "
ADVICE = ": see its log, and publish the model again"


@pytest.fixture
def slot() -> Iterator[Slot]:
    connection = Connection("127.0.0.1:1", "unet", "3", 1.0)
    yield Slot(connection, (3, 1, 204, 204))
    connection.close()


def answer(slot: Slot, *outputs: tuple[str, str, tuple[int, ...]], version: str = "3", raw: bytes | None = None) -> Any:
    """An answer that says that it has these outputs; its bytes are those of the values."""
    from tritonclient.grpc import service_pb2

    response = service_pb2.ModelInferResponse(model_name="unet", model_version=version)
    for name, datatype, shape in outputs or (("probability", "FP16", SHAPE),):
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(VALUES.tobytes() if raw is None else raw)
    return slot.connection.grpc.InferResult(response)


def test_a_whole_answer_passes_as_it_is(slot: Slot) -> None:
    found = probabilities(slot, answer(slot), 2)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, VALUES)


def test_another_version_is_refused_and_any_passes_where_none_was_found_yet(slot: Slot) -> None:
    with pytest.raises(ServerError) as caught:
        probabilities(slot, answer(slot, version="4"), 2)
    assert str(caught.value) == f"{SAID}unet version 4 instead of 3: see its log"
    assert caught.value.action is Action.LEAVE
    slot.connection.model_version = ""
    np.testing.assert_array_equal(probabilities(slot, answer(slot, version="4"), 2), VALUES)


@pytest.mark.parametrize(
    ("outputs", "listed"),
    [
        ([("probability", "FP16", (1, 1, 20, 20))], "probability FP16 [1, 1, 20, 20]"),
        ([("probability", "FP16", (2, 1, 20, 21))], "probability FP16 [2, 1, 20, 21]"),
        ([("probability", "FP16", (2, 20, 20))], "probability FP16 [2, 20, 20]"),
        ([("probability", "FP32", SHAPE)], "probability FP32 [2, 1, 20, 20]"),
        ([("image", "FP16", SHAPE)], "image FP16 [2, 1, 20, 20]"),
        (
            [("probability", "FP16", SHAPE), ("more", "FP16", (1,))],
            "probability FP16 [2, 1, 20, 20], more FP16 [1]",
        ),
    ],
)
def test_another_form_is_refused_by_what_it_says(
    slot: Slot, outputs: list[tuple[str, str, tuple[int, ...]]], listed: str
) -> None:
    with pytest.raises(ServerError) as caught:
        probabilities(slot, answer(slot, *outputs), 2)
    assert str(caught.value) == f"{SAID}{listed} instead of probability FP16 [2, 1, 20, 20]{ADVICE}"
    assert caught.value.action is Action.LEAVE


def test_an_answer_without_outputs_is_refused(slot: Slot) -> None:
    from tritonclient.grpc import service_pb2

    empty = slot.connection.grpc.InferResult(service_pb2.ModelInferResponse(model_version="3"))
    with pytest.raises(ServerError) as caught:
        probabilities(slot, empty, 2)
    assert str(caught.value) == f"{SAID}nothing instead of probability FP16 [2, 1, 20, 20]{ADVICE}"


@pytest.mark.parametrize("change", [-2, -1, 1, 2])
def test_bytes_that_do_not_fit_the_shape_are_refused(slot: Slot, change: int) -> None:
    raw = VALUES.tobytes()
    with pytest.raises(ServerError) as caught:
        probabilities(slot, answer(slot, raw=raw[:change] if change < 0 else raw + bytes(change)), 2)
    assert str(caught.value).startswith(f"{SAID}pixels that do not fit their shape (")
    assert str(caught.value).endswith(f"){ADVICE}")
    assert caught.value.action is Action.LEAVE


def test_what_is_no_probability_is_refused(slot: Slot) -> None:
    bad = VALUES.copy()
    bad[1, 0, 19, 19] = np.nan
    with pytest.raises(ServerError) as caught:
        probabilities(slot, answer(slot, raw=bad.tobytes()), 2)
    assert str(caught.value) == f"{SAID}1 values that are not from 0 to 1, nan the first of them{ADVICE}"
