"""Campaigns of damaged files: a short one always, the long one by `make torture`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import fuzz
from tests.torture.fuzz import Campaign, Worker, attack
from tests.torture.seeds import Seed


def check(found: Campaign) -> None:
    assert list(found.findings.values()) == []
    total = {kind: sum(counts[kind] for counts in found.verdicts.values()) for kind in ("read", "refused")}
    # Damage that nothing notices, or that everything notices at once, would show little.
    assert min(total.values()) > found.inputs / 10


def test_damaged_files_are_read_or_refused_in_a_sentence() -> None:
    check(attack(400, campaign=7))


@pytest.mark.slow
def test_many_damaged_files_are_read_or_refused_in_a_sentence() -> None:
    check(attack(20_000, campaign=8))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("import os; os.abort()", "ended with -6"),
        ("while True: pass", "ended with -9"),
        ("bytearray(3 << 30)", "MemoryError"),
        ("{}['x']", "KeyError"),
    ],
)
def test_a_reader_that_crashes_hangs_or_swallows_memory_is_a_fault(
    body: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(
        f"from tests.torture import fuzz\n\ndef faulty(path):\n    {body}\n\n"
        "fuzz.READERS['volume'] = faulty\nfuzz.work()\n"
    )
    monkeypatch.setattr(fuzz, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(fuzz, "_START_S", 20.0)
    monkeypatch.setattr(fuzz, "WORKER", [str(script)])
    worker = Worker()
    assert said in worker.judge(Seed("faulty", script, "volume"), script)["said"]
    worker.close()
