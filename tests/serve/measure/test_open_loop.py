"""Random arrivals against servers whose times are known, and against the real one."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from serve.measure import open_loop as module
from serve.measure.common import MeasureError
from serve.measure.open_loop import Receive, open_load, open_loop, poisson_arrivals, second_opinion
from serve.measure.perf_analyzer import PerfAnalyzer
from serve.segment.connection import Connection
from serve.server.process import TritonServer


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.diff(poisson_arrivals(50.0, 20_000, seed=1), prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    # Of an exponential distribution: as much spread as mean, and a share of exp(-1) beyond it.
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)
    assert (gaps > 1 / 50).mean() == pytest.approx(np.exp(-1), abs=0.02)


def test_times_count_from_the_intended_start() -> None:
    """The sender is held up by 0.3 s once: all that were due meanwhile have waited, which a closed loop hides."""
    held_up = iter([True])

    def send(receive: Receive) -> None:
        if next(held_up, False):
            time.sleep(0.3)
        receive()

    found = open_loop(send, 200.0, 60, timeout_s=1)
    assert max(found.latencies_s) >= 0.3
    # Those that were due in these 0.3 s waited for what was left of them, half of it on average.
    late = [one for one in found.latencies_s if one > 0.02]
    assert len(late) >= 20
    assert 0.1 < np.mean(late) < 0.25
    assert found.percentile_ms(50) is not None
    assert found.percentile_ms(99) is None


def test_a_server_that_is_too_slow_does_not_keep_the_rate() -> None:
    """One worker of 10 ms under 400 arrivals a second: it answers 100, and the queue grows."""
    with ThreadPoolExecutor(1) as worker:

        def work(receive: Receive) -> None:
            threading.Event().wait(0.01)
            receive()

        slow = open_loop(lambda receive: worker.submit(work, receive), 400.0, 100, timeout_s=30)
        quick = open_loop(lambda receive: worker.submit(receive), 400.0, 100, timeout_s=30)
    assert not slow.kept
    assert slow.answered_per_s < 110
    assert slow.latencies_s[-1] > 0.4
    assert quick.kept


def test_far_behind_the_rest_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_IN_FLIGHT", 5)
    waiting: list[Receive] = []
    timer = threading.Timer(0.2, lambda: [receive() for receive in waiting])
    timer.start()
    found = open_loop(waiting.append, 1e4, 100, timeout_s=30)
    assert found.overloaded
    assert not found.kept
    assert len(found.latencies_s) == 5


def test_failures_are_counted_and_missing_answers_are_an_error() -> None:
    found = open_loop(lambda receive: receive(error=RuntimeError("full")), 1e4, 7, timeout_s=1)
    assert found.failures == {"full": 7}
    assert not found.kept
    assert found.percentile_ms(50) is None
    with pytest.raises(MeasureError, match=r"3 of 3 answers at 10000 requests/s did not come within 0\.1 s"):
        open_loop(lambda receive: None, 1e4, 3, timeout_s=0.1)


def test_a_real_server_under_random_arrivals(triton_server: TritonServer, tmp_path: object) -> None:
    connection = Connection(triton_server.settings.grpc_url, "unet", "", 60)
    found = open_load(connection, 204, 100.0, 150)
    assert found.failures == {}
    assert len(found.latencies_s) == 150
    assert found.percentile_ms(95) is not None
    assert found.percentile_ms(99) is None
    perf = second_opinion(PerfAnalyzer(tmp_path), connection, 204, 100.0, 60)  # type: ignore[arg-type]
    assert perf.p50_ms is not None
    assert perf.p50_ms > 0
    assert (perf.p99_ms is None) == ("too few for p99" in perf.note)
    connection.close()
