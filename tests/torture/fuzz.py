"""Hostile files for every reader: ``python -m tests.torture.fuzz --inputs 100000 --out torture.md``.

Each input is a damaged copy of a valid one (`seeds`, `mutate`), made from the campaign's number and its own alone. A
process of its own reads it: within a time, within a gibibyte, and either the input is read or one sentence says what
is wrong. Everything else is a finding, and its input is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.torture.mutate import files_of, mutated
from tests.torture.seeds import BAND_ROWS, JOURNAL_BANDS, JOURNAL_HEADER, SHAPE, Seed, band, write_seeds
from unet.errors import UnetError, say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

TIMEOUT_S = 30.0
# Of the worker's own processor time: what another process takes does not count.
SLOW_S = 5.0
MEMORY_BYTES = 1 << 30
_PAGE_BYTES = 1 << 26
_START_S = 120.0
# A worker that has read so many inputs makes way for a new one.
_INPUTS_PER_WORKER = 2000
WORKER = ["-m", "tests.torture.fuzz", "--worker"]
ROOT = Path(__file__).resolve().parents[2]


def read_volume(path: Path) -> None:
    """Open a volume and read its first slices."""
    from unet.volume import open_volume

    with open_volume(path) as volume:
        volume.fingerprint()
        rows = min(volume.height, max(1, _PAGE_BYTES // max(1, volume.width * volume.dtype.itemsize)))
        for page in range(min(volume.pages, 4)):
            assert volume.rows(page, 0, rows).shape == (rows, volume.width)


def read_card(path: Path) -> None:
    """Load a card and verify what it lists."""
    from unet.card import Card

    card = Card.load(path)
    for name in card.artefacts:
        card.verify(name)
    for engine in card.engines:
        card.verify_engine(engine)


def read_settings(path: Path) -> None:
    """Take the settings of a former training run."""
    from train.config import config_of
    from train.config import read_settings as read

    config_of(read(path))


def read_journal(path: Path) -> None:
    """Go on with an interrupted run: a band is recalled as it was, or computed again."""
    from serve.volume.partial import Partial, RawStore

    run = Partial(path, JOURNAL_HEADER, resume=True, anew=False)
    store = RawStore(path / "rows", *SHAPE[1:], np.dtype(np.float16))
    try:
        for page, row in JOURNAL_BANDS:
            rows = run.recall(store, page, row, row + BAND_ROWS)
            assert rows is None or np.array_equal(rows, band(page, row)), "another band's pixels"
    finally:
        store.close()
        run.close(finished=False)


READERS: dict[str, Callable[[Path], None]] = {
    "volume": read_volume,
    "card": read_card,
    "settings": read_settings,
    "journal": read_journal,
}


def judge(reader: str, path: Path) -> dict[str, Any]:
    """Read one input here: "read", "refused" with its sentence, or "fault" with what went wrong."""
    started = time.process_time()
    try:
        READERS[reader](path)
        verdict: dict[str, Any] = {"verdict": "read"}
    except UnetError as error:
        said = str(error)
        good = bool(said.strip()) and len(said.splitlines()) == 1 and len(said) < 2000
        verdict = (
            {"verdict": "refused", "said": said}
            if good
            else {"verdict": "fault", "said": f"no sentence: {said!r:.300}"}
        )
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        ours = [f"{Path(one.filename).name}:{one.name}" for one in place if str(ROOT) in one.filename]
        verdict = {"verdict": "fault", "said": f"{type(error).__name__} in {' > '.join(ours[-2:])}: {str(error)[:200]}"}
    taken = time.process_time() - started
    if taken > SLOW_S:
        verdict = {"verdict": "fault", "said": f"{taken:.1f} s for {reader}"}
    return verdict


def work() -> None:
    """A worker: reads lines "READER PATH", answers each with a line of JSON."""
    import h5py
    import mrcfile
    import tensorstore
    import zarr

    del h5py, mrcfile, tensorstore, zarr
    # The libraries' own words would mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    for line in sys.stdin:
        reader, _, path = line.rstrip("\n").partition(" ")
        print(json.dumps(judge(reader, Path(path))), file=answers, flush=True)


class Worker:
    """A process that reads inputs, and is replaced when one kills it or keeps it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._read = 0

    def judge(self, seed: Seed, path: Path) -> dict[str, Any]:
        """What the process makes of one input."""
        if self._process is None or self._read >= _INPUTS_PER_WORKER:
            self.close()
            line = [sys.executable, *WORKER]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                line, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._read = 0
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        self._read += 1
        # The first answer waits for the imports too.
        limit = threading.Timer(TIMEOUT_S if self._read > 1 else TIMEOUT_S + _START_S, process.kill)
        limit.start()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{seed.reader} {path}\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        limit.cancel()
        if answer:
            return dict(json.loads(answer))
        status, self._process = process.wait(), None
        return {
            "verdict": "fault",
            "said": f"the process ended with {status} (-9: it took more than {TIMEOUT_S:.0f} s)",
        }

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@dataclass
class Campaign:
    """What came of a campaign: verdicts by seed, and the findings, one for each kind."""

    inputs: int = 0
    verdicts: dict[str, Counter[str]] = field(default_factory=dict)
    findings: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """As Markdown."""
        lines = ["| input | tried | read | refused in a sentence | faults |", "|---|---:|---:|---:|---:|"]
        for name, found in sorted(self.verdicts.items()):
            counts = " | ".join(f"{found[one]:,}" for one in ("read", "refused", "fault"))
            lines.append(f"| {name} | {found.total():,} | {counts} |")
        total = sum(self.verdicts.values(), Counter[str]())
        lines.append(f"| all | {total.total():,} | {total['read']:,} | {total['refused']:,} | {total['fault']:,} |")
        return "\n".join(lines)


@contextlib.contextmanager
def damaged(seed: Seed, number: int, campaign: int, folder: Path) -> Iterator[Path]:
    """A damaged copy of a seed, for as long as the block lasts."""
    rng = random.Random(f"{campaign} {seed.name} {number}")
    path = folder / seed.path.name
    if seed.path.is_dir():
        shutil.copytree(seed.path, path)
    else:
        shutil.copy(seed.path, path)
    victim = rng.choice(files_of(path))
    victim.write_bytes(mutated(victim.read_bytes(), rng, name=victim.name))
    try:
        yield path
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def attack(inputs: int, campaign: int, keep: Path | None = None, *, note: Callable[[str], None] = say) -> Campaign:
    """Try so many inputs, the same share of each seed.

    Args:
        inputs: how many.
        campaign: the number that all damage follows from.
        keep: folder for one input of each kind of finding; None keeps none.
        note: takes a line every ten seconds.
    """
    found, worker, said_at = Campaign(), Worker(), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        (place := Path(scratch) / "seeds").mkdir()
        (copies := Path(scratch) / "damaged").mkdir()
        seeds = write_seeds(place)
        for number in range(inputs):
            seed = seeds[number % len(seeds)]
            with damaged(seed, number // len(seeds), campaign, copies) as path:
                verdict = worker.judge(seed, path)
                found.inputs += 1
                found.verdicts.setdefault(seed.name, Counter())[verdict["verdict"]] += 1
                if verdict["verdict"] == "fault":
                    _note(found, seed, number // len(seeds), verdict["said"], path, keep)
            if time.monotonic() - said_at > 10:
                said_at = time.monotonic()
                note(f"{number + 1:,} of {inputs:,} inputs, {len(found.findings)} kinds of faults")
    worker.close()
    return found


def _note(found: Campaign, seed: Seed, number: int, said: str, path: Path, keep: Path | None) -> None:
    kind = f"{seed.reader}: {said.split(':')[0]}"
    if kind in found.findings:
        return
    found.findings[kind] = f"{seed.name} {number}: {said}"
    if keep is not None and path.exists():
        keep.mkdir(parents=True, exist_ok=True)
        target = keep / f"{len(found.findings):02}-{seed.name}"
        shutil.copytree(path, target, dirs_exist_ok=True) if path.is_dir() else shutil.copy(path, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.fuzz", description="Damaged files for every reader.")
    parser.add_argument("--inputs", type=int, default=100_000, help="how many (default: 100000)")
    parser.add_argument("--campaign", type=int, default=0, help="the number that all damage follows from (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("torture.md"), help="file for the counts (default: torture.md)"
    )
    parser.add_argument("--keep", type=Path, default=Path("torture"), help="folder for inputs that were findings")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(argv)
    if chosen.worker:
        work()
        return 0
    found = attack(chosen.inputs, chosen.campaign, chosen.keep)
    lines = ["# Damaged files", "", f"Campaign {chosen.campaign}: {found.inputs:,} inputs.", "", found.table(), ""]
    lines += [f"- {finding}" for finding in found.findings.values()] or ["No faults."]
    chosen.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    say("\n".join(lines))
    return 1 if found.findings else 0


if __name__ == "__main__":
    sys.exit(main())
