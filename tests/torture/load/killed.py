"""Clients that are killed in the middle of a request: ``python -m tests.torture.load.killed URL COUNT``.

One process loads the libraries and forks each client, which shares memory with the server and sends one request after
the other. Each says when its request is on its way, and is killed some milliseconds later.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time

import tritonclient.grpc  # loaded before the first client is forked

from serve.segment.connection import Connection
from serve.segment.slot import SharedSlot
from tests.torture.load.server import SIDE

# About as long as a request takes.
_LATEST_S = 0.02


def client(url: str, ready: int) -> None:
    """Send requests in shared memory until this process is killed."""
    connection = Connection(url, "unet", "", 60.0)
    slot = SharedSlot(connection, (1, 1, SIDE, SIDE))
    said = False
    while True:
        answered = threading.Event()
        connection.infer_async(*slot.tensors(connection.grpc, 1), lambda result, error: answered.set())  # noqa: B023
        if not said:
            os.write(ready, b".")
            said = True
        answered.wait()


def kill_one(url: str, rng: random.Random) -> int:
    """Start a client, and kill it while a request of it is on its way; gives its process number."""
    ready, says = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            client(url, says)
        finally:
            os._exit(1)
    os.close(says)
    try:
        assert os.read(ready, 1), "a client ended by itself"
        time.sleep(rng.random() * _LATEST_S)  # no condition: any moment will do
    finally:
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(ready)
    assert os.WIFSIGNALED(status), "a client ended by itself"
    return child


def main(url: str, count: int) -> None:
    """Kill so many, and say which."""
    assert tritonclient.grpc
    rng = random.Random(os.getpid())
    for _ in range(count):
        sys.stdout.write(f"{kill_one(url, rng)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
