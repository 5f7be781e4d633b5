"""A client's stack is of one network, whatever is published meanwhile; a hundred changes by `make torture`."""

from __future__ import annotations

from tests.torture.publishing import attack


def test_what_is_published_under_a_client_fails_no_run_and_mixes_no_stack() -> None:
    found = attack(3)
    assert found.faults == []
    assert found.changes == 3
    # A change while nothing is segmented would show nothing.
    assert found.within >= 1
    assert found.answers.total() == found.runs >= 3
