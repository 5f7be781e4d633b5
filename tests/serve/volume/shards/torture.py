"""Kills tasks, workers, clients and schedulers at random, and compares every byte: ``make torture-shards``."""

from __future__ import annotations

import argparse
import filecmp
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.serve.volume.shards.harness import make_blocks, served, tiles_computed
from unet.errors import command, say
from unet.processes import free_ports

KINDS = ["--output", "probability"]
# Kills of each hundred.
TASKS, WORKERS, CLIENTS, SCHEDULERS = 60, 25, 10, 5


class Target:
    """A process that is started again when it has been killed."""

    def __init__(self, name: str, line: list[str]) -> None:
        self.name, self._line = name, line
        self.kills = 0
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.kills += 1
        self.process.wait()


class Attack:
    """One volume computed under kills."""

    def __init__(self, source: Path, out: Path, url: str, shards: int, seed: int, until: float) -> None:
        self._until = until
        self.out, self._shards, self._rng = out, shards, random.Random(seed)
        self.line = [
            sys.executable,
            "serve/client.py",
            str(source),
            "--url",
            url,
            "--quiet",
            *KINDS,
            "--in_flight",
            "1",
        ]
        self.line += ["--shard_mpx", "0.0001", "--output_dir", str(out), "--patience_s", "60"]

    @property
    def over(self) -> bool:
        """Whether no more is to be killed."""
        return self.finished or time.monotonic() > self._until

    @property
    def finished(self) -> bool:
        return (self.out / "v-probability.zarr").exists() and not (self.out / "v.shards").exists()

    def marked(self) -> int:
        try:
            return sum(1 for _ in (self.out / "v.shards" / "done").iterdir())
        except FileNotFoundError:
            return 0

    def moment(self, kills_left: int) -> None:
        """Wait for a random moment: of a start, or after some shards; slow enough that the work outlasts the kills."""
        if self._rng.random() < 0.2:
            time.sleep(self._rng.uniform(0, 2.5))
            return
        now = self.marked()
        more = self._rng.uniform(0, 1.6) * max(0, self._shards - now) / (kills_left + 2)
        deadline = time.monotonic() + 20
        while self.marked() < now + more and not self.finished and time.monotonic() < deadline:
            time.sleep(0.03)
        time.sleep(self._rng.uniform(0, 0.05))

    def tasks(self, kills: int) -> dict[str, int]:
        """Two tasks of ``--shard K/2``."""
        both = [Target(f"task {index}", [*self.line, "--shard", f"{index}/2"]) for index in range(2)]
        while sum(one.kills for one in both) < kills and not self.over:
            self.moment(kills - sum(one.kills for one in both))
            one = self._rng.choice(both)
            one.kill()
            one.start()
        for one in both:
            one.process.wait()
        subprocess.run([*self.line, "--shard", "0/1"], check=True)
        return {"tasks": sum(one.kills for one in both)}

    def cluster(self, workers: int, clients: int, schedulers: int) -> dict[str, int]:
        """A Dask cluster of two workers; each part is started again as a job manager does."""
        port = free_ports(1)[0]
        address = f"tcp://127.0.0.1:{port}"
        dask = [sys.executable, "-m"]
        flags = ["--no-dashboard"]
        scheduler = Target(
            "scheduler", [*dask, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port), *flags]
        )
        worker = [*dask, "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", *flags]
        both = [Target(f"worker {index}", worker) for index in range(2)]
        client = Target("client", [*self.line, "--dask", address, "--resume"])
        wanted = ["worker"] * workers + ["client"] * clients + ["scheduler"] * schedulers
        self._rng.shuffle(wanted)
        kills = dict.fromkeys(("worker", "client", "scheduler"), 0)
        for number, kind in enumerate(wanted):
            if self.over:
                break
            self.moment(len(wanted) - number)
            for part in (scheduler, *both, client):  # a scheduler's end ends the others with one sentence
                if part.process.poll() is not None:
                    part.start()
            part = {"worker": self._rng.choice(both), "client": client, "scheduler": scheduler}[kind]
            before = part.kills
            part.kill()
            kills[kind] += part.kills - before
            part.start()
        while not self.finished:
            for part in (scheduler, *both, client):
                if part.process.poll() is not None and not self.finished:
                    part.start()
            time.sleep(0.2)
        for part in (client, *both, scheduler):
            part.process.kill()
            part.process.wait()
        subprocess.run([*self.line, "--shard", "0/1"], check=True)
        return {f"{name}s": count for name, count in kills.items()}


def differing(one: Path, other: Path) -> list[str]:
    """Files that differ, or that only one has."""
    names = [{str(item.relative_to(root)) for item in root.rglob("*") if item.is_file()} for root in (one, other)]
    _, wrong, faulty = filecmp.cmpfiles(one, other, names[0] & names[1], shallow=False)
    return sorted({*wrong, *faulty, *(names[0] ^ names[1])})


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Attack two volumes at a time, and print the counts; exit code 1 if a byte differs or too much was done twice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--shards", type=int, default=14_000, help="of each of the two volumes")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which nothing more is killed")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(argv)
    share = chosen.kills / 100
    counts: dict[str, int] = {}
    started = time.monotonic()
    until = started + 60 * chosen.minutes
    with tempfile.TemporaryDirectory(prefix="unet-torture-") as name, served((204,)) as url:
        source = make_blocks(Path(name) / "v.zarr", (chosen.shards, 20, 20), (1000, 20, 20))
        alone = Path(name) / "alone"
        line = [sys.executable, "serve/client.py", str(source), "--url", url, *KINDS, "--output_dir", str(alone)]
        one, other = (
            Attack(source, Path(name) / kind, url, chosen.shards, chosen.seed, until) for kind in ("tasks", "dask")
        )
        works = [
            threading.Thread(target=lambda: subprocess.run([*line, "--quiet"], check=True)),
            threading.Thread(target=lambda: counts.update(one.tasks(round(TASKS * share)))),
            threading.Thread(
                target=lambda: counts.update(
                    other.cluster(*(round(part * share) for part in (WORKERS, CLIENTS, SCHEDULERS)))
                )
            ),
        ]
        for work in works:
            work.start()
        for work in works:
            work.join()
        again = tiles_computed(url) - 3 * chosen.shards
        wrong = [*differing(alone, one.out), *differing(alone, other.out)]
    say(f"kills: {counts}, {sum(counts.values())} in all, {time.monotonic() - started:.0f} s")
    say(f"computed again: {again} of {2 * chosen.shards} shards, {again / 2 / chosen.shards:.2%}")
    say(f"files that differ: {len(wrong)} {wrong[:3]}")
    return int(bool(wrong) or again > 0.01 * 2 * chosen.shards or sum(counts.values()) < chosen.kills)


if __name__ == "__main__":
    sys.exit(main())
