from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from export.plan.memory import activation_bytes, plan_memory, weight_bytes
from export.plan.settings import BuildSettings
from export.steps.graph import constants
from unet.card import Card
from unet.engine.targets import TARGETS

GIB = 1 << 30


def test_activations_are_those_of_the_widest_moment(half: Any) -> None:
    # At the last level up: the concatenation of 2 x 2 channels of 2 bytes, and what its convolution makes of it, two.
    # By hand for tiles of 204: 36 wide before it, and (204 - 4) wide what waits for it while the network goes down.
    size, skip = 204, 200
    first = 2 * 2 * (size - 2) ** 2 + 2 * 2 * skip**2
    assert activation_bytes(half, 1, size) == first
    assert activation_bytes(half, 16, size) == 16 * first
    assert weight_bytes(half) == sum(value.nbytes for value in constants(half).values())


def test_a_v100_holds_what_its_profile_serves_by_default(half: Any) -> None:
    """The network of 64 filters has 32 times the channels of this one: so have its activations."""
    memory = plan_memory(half, BuildSettings.of((572, 700)))
    activations = 32 * memory["activation_bytes_per_context"]
    scratch = 1_135_808_770  # what TensorRT-RTX asks for at that size
    contexts = 2 * memory["contexts_per_instance"]
    assert contexts * activations == pytest.approx(7.4 * GIB, rel=0.02)
    assert contexts * (activations + scratch) + 62e6 < 0.9 * TARGETS["v100"].memory_gib * GIB


def test_the_card_says_it(for_v100: Path) -> None:
    memory = Card.load(for_v100).model["plan_memory"]
    assert memory["contexts_per_instance"] == 2
    assert memory["workspace_bytes_per_context_at_most"] == 2 * GIB
