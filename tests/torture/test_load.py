"""A few seconds of the campaigns of load; minutes, and the limits of time and memory, by `make torture`."""

from __future__ import annotations

import numpy as np
import pytest

from tests.torture.load import memory, overload
from tests.torture.load.server import is_right, tiles

LIMITED, TIMED = overload.POLICIES


@pytest.mark.parametrize("policy", [LIMITED, TIMED])
def test_ten_times_the_load_is_refused_in_words_and_what_is_taken_is_answered_rightly(policy: str) -> None:
    found = overload.attack(1, policy)
    assert found.faults == []
    assert len(found.latencies_s) + found.refused.total() == found.sent
    assert set(found.refused) == {"maximum queue size" if policy == LIMITED else "timeout expired"}
    assert 0 < found.most_waiting <= overload.POLICIES[policy].max_queue_size
    assert found.recovery_s > 0


def test_clients_that_are_killed_in_the_middle_of_a_request_leave_nothing() -> None:
    found = memory.kill(6, "openvino")
    assert (found.done, found.faults) == (6, [])


def test_memory_is_measured_over_inferences_and_growth_is_told() -> None:
    found = memory.infer(300, "openvino")
    assert found.faults == []
    assert found.done >= 300
    (settled, before), (done, after) = found.ends
    assert (30 <= settled < done, before > 5, after > 5) == (True, True, True)
    found.grown.clear()
    found.memory_mib.append((found.done, 1.05 * before + 20.1))
    found.judge()
    assert len(found.grown) == 1


def test_the_answer_to_another_tile_is_a_wrong_one() -> None:
    first, second = tiles(2)
    answer = (first[..., 92:-92, 92:-92] / 255).astype(np.float16)
    assert is_right(answer, first)
    assert not is_right(answer, second)
    answer[0, 0, 7, 7] += np.float16(0.01)
    assert not is_right(answer, first)
