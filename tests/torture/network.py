"""A network that cuts, stalls and delays: ``python -m tests.torture.network --runs 300 --out torture.md``.

A client segments a stack through a proxy of our own, which at a random byte of the conversation cuts the connection,
stops to pass anything on without a word, or is slow all the time; once, or until it is mended. The client ends with the
right bytes and exit code 0, or in one sentence; then the same command through a sound network ends with the right bytes
and takes over what was done. It never waits longer than its flags say.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile

from tests.serve.volume.shards.harness import served
from tests.torture.faults.worker import Ended, Worker, build_layer
from tests.torture.kills import contents
from tests.torture.report import report
from unet.errors import say

TIMEOUT_S, PATIENCE_S = 2.0, 3.0
# An answer that does not come is waited for, then servers that went away, and the interface is looked at. The rest is
# for a machine that does other work.
LONGEST_S = 40.0
WAYS = ("cut once", "cut until mended", "stalled once", "stalled until mended", "slow")
_BLOCK = 8192


@dataclass
class Tally:
    """What came of it: of each way, how many runs ended how, and what was wrong."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def table(self) -> str:
        """As Markdown."""
        lines = [
            "| network | runs | right at once | ended in a sentence, right when repeated |",
            "|---|---:|---:|---:|",
        ]
        for way in WAYS:
            right, refused = self.counts[way, "right"], self.counts[way, "refused"]
            lines.append(f"| {way} | {right + refused} | {right} | {refused} |")
        return "\n".join(lines)


class Proxy:
    """Passes TCP on to a server on this machine, soundly until `plan` says otherwise."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        # The loop itself does not hold on to what it runs.
        self._tasks: set[asyncio.Task[None] | None] = set()
        self.mend()
        self.port = 0

    def plan(self, way: str, after: int, seed: int) -> None:
        """What is to happen once so many bytes have been passed on."""
        self._way, self._after, self._rng = way, after, random.Random(seed)

    def mend(self) -> None:
        """Be sound again."""
        self._way, self._after, self.passed, self.met = "", 0, 0, False

    def __enter__(self) -> Proxy:
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        ).result()
        self.port = server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *raised: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())
        if self.met and self._way == "cut until mended":
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        pumps = [self._pump(reader, back, writer), self._pump(there, writer, back)]
        with contextlib.suppress(asyncio.CancelledError):  # the campaign is over
            await asyncio.gather(*pumps, return_exceptions=True)
        for end in (writer, back):
            end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, other: asyncio.StreamWriter
    ) -> None:
        stalled = False
        while block := await reader.read(_BLOCK):
            self.passed += len(block)
            if self._way == "slow":
                await asyncio.sleep(self._rng.uniform(0, 0.002))
            elif self._way and self.passed > self._after and not self.met:
                self.met = True
                if self._way.startswith("cut"):
                    # A part of a message has gone through.
                    writer.write(block[: len(block) // 2])
                    await writer.drain()
                    for end in (writer, other):
                        end.transport.abort()
                    return
                stalled = True
            if stalled or (self.met and self._way == "stalled until mended"):
                continue  # nothing is passed on, and nobody is told
            writer.write(block)
            await writer.drain()
        if not stalled:
            writer.write_eof()


class Campaign:
    """A stack, its right result, and the client that is attacked."""

    def __init__(self, worker: Worker, proxy: Proxy, folder: Path) -> None:
        self._worker, self._proxy, self._folder = worker, proxy, folder
        source = folder / "v.tif"
        pixels = np.random.default_rng(4).integers(0, 256, (8, 120, 130), np.uint8)
        tifffile.imwrite(source, pixels, photometric="minisblack")
        self._line = [str(source), "--url", f"127.0.0.1:{proxy.port}", "--quiet", "--resume"]
        self._line += ["--shared_memory", "off", "--timeout_s", f"{TIMEOUT_S:g}", "--patience_s", f"{PATIENCE_S:g}"]
        self._line += ["--output", "probability", "--output", "labels"]
        ended = self._run("whole")
        assert ended.code == 0, ended
        self._whole, self._bytes = contents(folder / "whole"), proxy.passed

    def _run(self, name: str) -> Ended:
        return self._worker.run(
            "serve.client:main", [*self._line, "--output_dir", str(self._folder / name)], self._folder
        )

    def attempt(self, way: str, seed: int) -> tuple[str, str]:
        """How one run ended, "right" or "refused", and what was wrong with it."""
        shutil.rmtree(self._folder / "out", ignore_errors=True)
        self._proxy.mend()
        self._proxy.plan(way, random.Random(seed).randrange(self._bytes), seed)
        started = time.monotonic()
        ended = self._run("out")
        took = time.monotonic() - started
        self._proxy.mend()
        problems = list(self._problems(ended, took))
        if ended.code:
            again = self._run("out")
            if again.code:
                problems.append(f"the repeat ends with {again.code}: {again.err.strip()[-300:]}")
            elif contents(self._folder / "out") != self._whole:
                problems.append("the repeat has other bytes")
        return "refused" if ended.code else "right", "; ".join(problems)

    def _problems(self, ended: Ended, took: float) -> Iterator[str]:
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        if took > LONGEST_S:
            yield f"it took {took:.0f} s"
        if ended.code == 0 and contents(self._folder / "out") != self._whole:
            yield "exit code 0 and other bytes"
        if ended.code and ("Traceback" in ended.err or len(errors) != 1):
            yield f"no single sentence, code {ended.code}: {ended.err[-300:]!r}"


def attack(runs: int, seed: int = 0, *, note: Callable[[str], None] = lambda text: None) -> Tally:
    """Segment a stack so many times through a bad network.

    Args:
        runs: how many, each way in turn.
        seed: of the moments.
        note: takes a line now and then.
    """
    found = Tally()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unet-network-")))
        url = stack.enter_context(served((204,)))
        proxy = stack.enter_context(Proxy(int(url.rpartition(":")[2])))
        worker = stack.enter_context(Worker(build_layer(folder), ("serve.client", "tifffile", "scipy.ndimage")))
        campaign = Campaign(worker, proxy, folder)
        for number in range(runs):
            way = WAYS[number % len(WAYS)]
            verdict, problem = campaign.attempt(way, seed + number)
            found.counts[way, verdict] += 1
            if problem:
                found.faults.append(f"run {number}, {way}: {problem}")
            if number % 10 == 9:
                note(f"{number + 1} of {runs} runs, {len(found.faults)} faults")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.network", description="A bad network.")
    parser.add_argument("--runs", type=int, default=300, help="of the client (default: 300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the counts are added to this file")
    chosen = parser.parse_args(argv)
    found = attack(chosen.runs, chosen.seed, note=say)
    lines = ["", "# A bad network", "", found.table(), "", *(f"- {fault}" for fault in found.faults)]
    return report(lines, chosen.out, found.faults)


if __name__ == "__main__":
    sys.exit(main())
