"""A server's memory over many inferences, and over clients that are killed while they share memory with it."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from serve.models.config import ModelSettings
from serve.segment.connection import Connection
from serve.segment.errors import ClientError
from serve.segment.slot import PREFIX, SHARED_MEMORY_DIR, SharedSlot, Slot
from serve.server.process import TritonServer
from tests.torture.load.server import LIMIT_S, SIDE, ask, loaded_server, memory_mib, tiles

# Growth that is allowed: allocators and pools fill slowly.
SHARE, MIB = 0.05, 20.0
_CLIENTS, _MOST = 4, 8
_TILES = tiles(16)
# As Triton, and then its guard, write it to the log.
_CRASHED = re.compile(r"Signal \(\d+\) received|tritonserver ended by signal \d+")


@dataclass
class Remembered:
    """What came of one campaign.

    Attributes:
        what: was done, in words.
        done: how often.
        requests: that this took.
        memory_mib: of the server, each with how often it was done by then.
        settled: how often it was done when memory was measured for the comparison.
        awaited_s: until the last region of a killed client was given back.
        faults: what is wrong.
        grown: memory that has grown by more than is allowed; a few requests settle nothing.
    """

    what: str
    done: int = 0
    requests: int = 0
    memory_mib: list[tuple[int, float]] = field(default_factory=list)
    settled: int = 0
    awaited_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    grown: list[str] = field(default_factory=list)

    def measure(self, server: TritonServer) -> None:
        """Note the server's memory as it is now."""
        self.memory_mib.append((self.done, memory_mib(server)))

    def judge(self) -> None:
        """Note whether memory has grown by more than is allowed."""
        (done, before), (_, after) = self.ends
        if after > before * (1 + SHARE) + MIB:
            self.grown.append(f"{self.what}: {before:.0f} MiB after {done:,}, {after:.0f} MiB after {self.done:,}")

    @property
    def ends(self) -> tuple[tuple[int, float], tuple[int, float]]:
        """What is compared: the first measurement after it had settled, and the last one."""
        return next(one for one in self.memory_mib if one[0] >= self.settled), self.memory_mib[-1]

    def row(self) -> str:
        """A row of the table."""
        (settled, before), (_, after) = self.ends
        most = max(mib for done, mib in self.memory_mib if done >= settled)
        times = f"{self.done:,} in {self.requests:,} requests" if self.requests else f"{self.done:,}"
        cells = (self.what, times, f"{before:.1f} after {settled:,}", f"{after:.1f}", f"{most:.1f}")
        wrong = len(self.faults) + len(self.grown)
        return f"| {' | '.join(cells)} | {after - before:+.1f} | {self.awaited_s:.1f} | {wrong} |"


HEAD = (
    "| what | times | MiB settled | MiB at the end | MiB at most | growth MiB | released after s | faults |\n"
    "|---|" + "---:|" * 7
)


def infer(times: int, backend: str, *, note: Callable[[str], None] = lambda text: None) -> Remembered:
    """Have so many tiles computed, in requests of 1 to 8, half of them in shared memory, and watch the memory."""
    found = Remembered(f"inferences, {backend}", settled=times // 10)
    with loaded_server(0, ModelSettings(max_batch_size=_MOST, backend=backend)) as server, _clients(server, found):
        while found.done < times:
            target = min(times, found.done + max(1, times // 50))
            _await(lambda target=target: found.done >= target or found.faults, float("inf"))  # type: ignore[misc]
            found.measure(server)
            note(f"{found.what}: {found.done:,} of {times:,}, {found.memory_mib[-1][1]:.1f} MiB")
            if found.faults:
                break
    found.judge()
    note(found.row())
    return found


@contextmanager
def _clients(server: TritonServer, found: Remembered) -> Iterator[None]:
    """Clients that send as fast as answers come, as long as the block lasts."""
    enough, lock = threading.Event(), threading.Lock()

    def run(number: int) -> None:
        kind = (Slot, SharedSlot)[number % 2]
        connection = Connection(server.settings.grpc_url, "unet", "", LIMIT_S)
        try:
            slot, rng = kind(connection, (_MOST, 1, SIDE, SIDE)), np.random.default_rng(number)
            while not enough.is_set():
                batch = rng.permutation(_TILES[:, 0])[: rng.integers(1, _MOST, endpoint=True)]
                right = ask(connection, slot, batch)
                with lock:
                    found.done += len(batch)
                    found.requests += 1
                    if not right:
                        found.faults.append(f"{found.what}: a wrong answer by {kind.__name__}")
            slot.close()
        except ClientError as error:
            found.faults.append(f"{found.what}: {error}")
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def kill(times: int, backend: str, *, note: Callable[[str], None] = lambda text: None) -> Remembered:
    """Kill so many clients in the middle of a request in shared memory, while another one gets its answers."""
    found, killed = Remembered(f"killed clients, {backend}", settled=times // 10), set[int]()
    with loaded_server(1, ModelSettings(max_batch_size=_MOST, backend=backend)) as server:
        connection = Connection(server.settings.grpc_url, "unet", "", LIMIT_S)
        mine = SharedSlot(connection, (1, 1, SIDE, SIDE))
        try:
            for client in _killed(server, times):
                killed.add(client)
                found.done += 1
                if not ask(connection, mine, _TILES[found.done % len(_TILES)]):
                    found.faults.append(f"{found.what}: a wrong answer after {found.done} kills")
                if found.done % max(1, times // 50) == 0:
                    found.measure(server)
                    note(f"{found.what}: {found.done:,} of {times:,}, {found.memory_mib[-1][1]:.1f} MiB")
            _look_for_leftovers(connection, found, killed)
            if not ask(connection, mine, _TILES[0]):
                found.faults.append(f"{found.what}: a wrong answer at the end")
            found.measure(server)
        except ClientError as error:
            said = _CRASHED.search(server.settings.log.read_text(errors="replace"))
            found.faults.append(f"{found.what}, after {found.done}: {said[0] if said else error}")
        finally:
            mine.close()
            connection.close()
    found.judge()
    note(found.row())
    return found


def _killed(server: TritonServer, times: int) -> Iterator[int]:
    """The process number of each client, as they are killed."""
    line = [sys.executable, "-m", "tests.torture.load.killed", server.settings.grpc_url]
    lanes = [subprocess.Popen([*line, str(count)], stdout=subprocess.PIPE, text=True) for count in _shares(times)]
    try:
        for lane in lanes:
            assert lane.stdout is not None
            for said in lane.stdout:
                yield int(said)
            if lane.wait():
                raise ClientError(f"the process that kills clients ended with {lane.returncode}")
    finally:
        for lane in lanes:
            lane.kill()
            lane.communicate()


def _shares(times: int) -> Sequence[int]:
    return [times // 2, times - times // 2]


def _look_for_leftovers(connection: Connection, found: Remembered, killed: set[int]) -> None:
    """Await that nothing of the killed clients is left: no region in the server, no name in the system."""
    started = time.monotonic()

    def left() -> list[str]:
        regions = connection.client.get_system_shared_memory_status().regions
        names = [*regions, *(path.name for path in SHARED_MEMORY_DIR.glob(f"{PREFIX}*"))]
        return [name for name in names if int(name[len(PREFIX) :].partition("-")[0]) in killed]

    _await(lambda: not left(), LIMIT_S)
    found.awaited_s = time.monotonic() - started
    if names := left():
        found.faults.append(f"{found.what}: {len(names)} names are left, such as {names[0]}")


def _await(condition: Callable[[], object], limit_s: float) -> None:
    until = time.monotonic() + limit_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
