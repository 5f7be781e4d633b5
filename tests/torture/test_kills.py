"""Everything that runs is killed a few times; hundreds of times by `make torture`."""

from __future__ import annotations

import pytest

from tests.torture.kills import attack_export, attack_ranks, attack_serving


def test_client_server_and_network_may_be_killed_at_any_moment() -> None:
    found = attack_serving(6, seed=2)
    assert found.faults == []
    assert found.kills.total() == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_and_a_trainer_may_be_killed_at_any_moment() -> None:
    found = attack_ranks(3, seed=1)
    assert found.faults == []
    assert found.kills["rank"] + found.kills["trainer"] == 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_exporter_may_be_killed_at_any_moment() -> None:
    found = attack_export(3, seed=1)
    assert found.faults == []
    assert found.kills["exporter"] == 3
