"""A client through a bad network, each way once; hundreds of runs by `make torture`."""

from __future__ import annotations

from tests.torture.network import WAYS, attack


def test_a_network_that_cuts_stalls_and_delays_costs_no_pixel() -> None:
    found = attack(len(WAYS))
    assert found.faults == []
    assert found.counts.total() == len(WAYS)
    assert found.counts["slow", "right"] == 1
