"""Every writer under faults: ``python -m tests.torture.faults.campaign --out torture.md``.

The first call of a writer that changes a file fails, then the second, and so on to the last; each kind of fault on its
own, and death by SIGKILL is one of them. Each time the command says so in one sentence and ends with a code that is not
0, or goes on to the right bytes, or is dead; under a final name is the whole result, or what was there before; and the
same command without the fault gives the bytes of a run that nothing happened to, and leaves nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from tests.serve.volume.shards.harness import served
from tests.torture.faults.worker import FAULTS, FORGIVEN, Ended, Worker, build_layer
from tests.torture.faults.writer import Files, Writer
from tests.torture.faults.writers import writers
from tests.torture.report import report
from unet.errors import say

# Whose libraries a worker has loaded before it forks.
MODULES = ("serve.client", "serve.repository", "tests.torture.faults.jobs", "zarr", "scipy.ndimage", "tifffile")
# What a fault may end in.
VERDICTS = ("refused", "killed", "right", "wrong")


@dataclass
class Tally:
    """What came of a campaign."""

    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    findings: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """As Markdown."""
        lines = ["| writer | fault | calls tried | refused in a sentence | killed | went on, right bytes | wrong |"]
        lines.append("|---|---|---:|---:|---:|---:|---:|")
        for writer, fault in dict.fromkeys(key[:2] for key in self.counts):
            each = [self.counts[writer, fault, verdict] for verdict in VERDICTS]
            lines.append(f"| {writer} | {fault} | {sum(each)} | {' | '.join(map(str, each))} |")
        each = [sum(count for key, count in self.counts.items() if key[2] == verdict) for verdict in VERDICTS]
        return "\n".join([*lines, f"| all | | {sum(each)} | {' | '.join(map(str, each))} |"])


class Attack:
    """One writer, whose undisturbed result is known."""

    def __init__(self, worker: Worker, writer: Writer, folder: Path) -> None:
        self._worker, self.writer, self._folder = worker, writer, folder
        self._out = folder / "out"
        self._fresh()
        self.before = writer.files(self._out) if self._out.exists() else {}
        ended = self._run()
        assert ended.code == 0, f"{writer.name} fails undisturbed: {ended}"
        self.good = writer.files(self._out)
        assert self.good, writer.name

    def _fresh(self) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        self.writer.prepare(self._out)

    def _run(self, fault: str | None = None, at: int = 0) -> Ended:
        chosen = None if fault is None else FAULTS[fault]
        return self._worker.run(self.writer.call, self.writer.argv(self._out), self._out, chosen, at)

    def calls(self, fault: str) -> int:
        """How many calls the fault can befall."""
        self._fresh()
        return self._run(fault).calls

    def attempt(self, fault: str, at: int) -> tuple[str, str]:
        """The verdict on one fault, one of `VERDICTS`, and what is wrong."""
        self._fresh()
        ended = self._run(fault, at)
        left = self.writer.files(self._out) if self._out.exists() else {}
        problems = list(self._said(ended, fault, left))
        problems += [f"half-written: {name}" for name in self._finals(left) if not self._whole(left, name)]
        problems += self.writer.unsound(self._out)
        kept = self.writer.kept(self._out)
        if ended.code and not (ended.code < 0 and self._is_done(left)):
            problems += self._repeated(kept)
        verdict = "wrong" if problems else "killed" if ended.code < 0 else "refused" if ended.code else "right"
        return verdict, "; ".join(problems)

    def _is_done(self, left: Files) -> bool:
        """Whether all was done but for what an end tidies away: a repeat is then a command of its own."""
        return any(left.get(name) == self.good[name] != self.before.get(name) for name in self.writer.commits)

    def _repeated(self, kept: int) -> Iterator[str]:
        """What is wrong with the same command without a fault, which finds so much finished work."""
        again = self._run()
        now = self.writer.files(self._out)
        if again.code != 0:
            yield f"the repeat ends with {again.code}: {again.err.strip()[-300:]}"
        elif now != self.good:
            names = sorted(name for name in {*now, *self.good} if now.get(name) != self.good.get(name))
            yield f"the repeat differs in {names[:3]}"
        elif kept and again.out and not re.search(rf"(?<!\d){kept} (of|parts)", again.out):
            yield f"{kept} parts were finished, and the repeat says {again.out!r}"

    def _said(self, ended: Ended, fault: str, left: Files) -> Iterator[str]:
        lines = [line for line in ended.err.splitlines() if line and not line.startswith("warning: ")]
        if ended.code == -signal.SIGKILL and FAULTS[fault].number < 0:
            return
        if "Traceback" in ended.err or ended.code < 0:
            yield f"a crash, code {ended.code}: {' / '.join(ended.err.splitlines()[-2:])}"
        elif ended.code == 0:
            wrong = [name for name in self.good if left.get(name) != self.good[name]]
            if wrong:
                yield f"exit code 0 and wrong or missing: {wrong[:3]}"
        elif len(lines) != 1 or not lines[0].startswith("error: "):
            yield f"no single sentence: {ended.err[-300:]!r}"
        elif fault in FORGIVEN:
            yield f"refused what may be missing: {lines[0]}"

    def _finals(self, left: Files) -> list[str]:
        """The final names there are: the first part of each path that a pattern takes."""
        found = set()
        for name in left:
            parts = name.split("/")
            heads = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
            found |= {head for head in heads if any(_fits(head, one) for one in self.writer.finals)}
        return sorted(found)

    def _whole(self, left: Files, final: str) -> bool:
        """Whether what has a final name is the result, or what was there before."""

        def below(files: Files) -> Files:
            return {name: content for name, content in files.items() if name == final or name.startswith(f"{final}/")}

        return below(left) in (below(self.good), below(self.before))


def _fits(name: str, pattern: str) -> bool:
    """Whether a path, which is not hidden, is of a pattern's form and depth."""
    hidden = name.split("/")[-1].startswith(".")
    return not hidden and fnmatch(name, pattern) and name.count("/") == pattern.count("/")


def attack(
    cases: Mapping[tuple[str, str], Sequence[int]] | None = None,
    *,
    every: int = 1,
    names: Sequence[str] = (),
    kinds: Sequence[str] = (),
    note: Callable[[str], None] = lambda text: None,
) -> Tally:
    """Attack the writers.

    Args:
        cases: of a writer's and a fault's name the calls that are to fail, each in a run of its own; by default all.
        every: of all calls, one in so many.
        names: of the writers; all by default.
        kinds: of faults; all by default.
        note: takes a line for each writer and fault.
    """
    found = Tally()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="unet-faults-")))
        url = stack.enter_context(served((204,)))
        chosen = {
            writer: faults
            for writer in writers(folder, url)
            if not names or writer.name in names
            if (faults := [kind for kind in kinds or FAULTS if cases is None or (writer.name, kind) in cases])
        }
        libraries = dict.fromkeys(library for writer in chosen for library in writer.libraries)
        worker = stack.enter_context(Worker(build_layer(folder), [*MODULES, *libraries]))
        for writer, faults in chosen.items():
            one = Attack(worker, writer, folder)
            for fault in faults:
                started, calls = time.monotonic(), one.calls(fault)
                for at in range(1, calls + 1, every) if cases is None else cases[writer.name, fault]:
                    verdict, problem = one.attempt(fault, at)
                    found.counts[writer.name, fault, verdict] += 1
                    if problem:
                        found.findings.setdefault(f"{writer.name}, {fault}: {problem}"[:400], f"call {at} of {calls}")
                each = [f"{found.counts[writer.name, fault, one]} {one}" for one in VERDICTS]
                note(f"{writer.name}, {fault}: {calls} calls, {', '.join(each)}, {time.monotonic() - started:.0f} s")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.faults.campaign", description="Faults of writers.")
    parser.add_argument("--every", type=int, default=1, help="of the calls, one in so many fails (default: 1)")
    parser.add_argument("--writer", action="append", default=[], help="only this one; repeatable")
    parser.add_argument("--fault", action="append", default=[], choices=FAULTS, help="only this one; repeatable")
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the counts are added to this file")
    chosen = parser.parse_args(argv)
    found = attack(every=chosen.every, names=chosen.writer, kinds=chosen.fault, note=say)
    lines = ["", "# Faults of writers", "", found.table(), ""]
    lines += [f"- {finding} ({where})" for finding, where in found.findings.items()] or ["No faults."]
    return report(lines, chosen.out, found.findings)


if __name__ == "__main__":
    sys.exit(main())
