"""SIGKILLs of what runs, at random moments: ``python -m tests.torture.kills --kills 300 --ranks 60 --out torture.md``.

A server with its watcher, the process in it that runs the network, and a client that segments three stacks; then the
ranks of a training run; then an exporter. What was killed is started again by the same command until it ends well; then
each byte, or each weight, must be that of a run that nothing happened to, and nothing may be left. The writers are
killed at each call that changes a file by `tests.torture.faults`, tasks and clusters by
`tests.serve.volume.shards.torture`.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import tifffile

from serve.models.config import ModelSettings
from serve.models.publish import publish
from serve.server.state import load_state
from tests.serve.conftest import artefacts_dividing_by
from tests.torture.report import report
from unet.card import Card
from unet.errors import say
from unet.files import sha256_of
from unet.phantom import synthetic_stack
from unet.processes import free_ports

ROOT = Path(__file__).resolve().parents[2]
# Of the kills of a served segmentation.
ROLES = {"client": 0.7, "server": 0.15, "network's process": 0.15}
STEPS = 16
# Of one training run or export; then it is let through, so that many are compared.
MOST_OF_A_RUN = 5
_LIMIT_S = 120.0


@dataclass
class Tally:
    """What was killed, how often, and what was wrong afterwards."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    faults: list[str] = field(default_factory=list)

    def line(self) -> str:
        """In words."""
        each = ", ".join(f"{role} {count}" for role, count in self.kills.items())
        return f"{self.kills.total()} kills ({each}) over {self.runs} runs; {len(self.faults)} faults."


class Served:
    """A server with its watcher, by the command that an operator uses; it is started again when it has ended."""

    def __init__(self, folder: Path) -> None:
        publish(artefacts_dividing_by(folder / "artefacts", 255), folder / "models", ModelSettings(max_batch_size=8))
        http, self.port, metrics = free_ports(3)
        self._state = folder / "state"
        self._line = [sys.executable, "serve/triton.py", "run", "--watch", "--watch_interval_s", "0.2"]
        self._line += ["--model_control", "explicit"]
        self._line += ["--watch_timeout_s", "5", "--model_repository", str(folder / "models"), "--state_dir"]
        self._line += [str(self._state), "--http_port", str(http), "--grpc_port", str(self.port)]
        self._line += ["--metrics_port", str(metrics), "--log", str(folder / "triton.log")]
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Wait until it is ready; it is started if it does not run or ends meanwhile."""
        until(self._is_ready, "the server is ready")

    def _is_ready(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(self._line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        state = load_state(self._state)
        return state is not None and state.is_ready

    def kill(self, role: str) -> bool:
        """Kill the server, or the process in it that runs the network; whether there was one."""
        state = load_state(self._state)
        with contextlib.suppress(psutil.NoSuchProcess):
            if state is not None:
                server = psutil.Process(state.server_pid)
                victim = server if role == "server" else next(iter(server.children()), None)
                if victim is not None and victim.status() != psutil.STATUS_ZOMBIE:
                    victim.kill()
                    return True
        return False

    def stop(self) -> None:
        """End it in order."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(_LIMIT_S)


def until(met: Callable[[], bool], what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it was not met in two minutes.
    """
    end = time.monotonic() + _LIMIT_S
    while not met():
        if time.monotonic() > end:
            raise TimeoutError(f"not in {_LIMIT_S:g} s: {what}")
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder; empty folders with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = path.read_bytes()
        elif not any(path.iterdir()):
            found[f"{name}/"] = b""
    return found


def nobodys_memory() -> set[str]:
    """Shared memory that no living process has mapped."""
    names = {str(path) for path in Path("/dev/shm").iterdir()}
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            mapped = Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8", errors="replace")
            names -= {name for name in names if name in mapped}
    return names


def attack_serving(kills: int, seed: int, note: Callable[[str], None] = lambda text: None) -> Tally:
    """Kill client, server and the network's process while three stacks are segmented, over and over."""
    found, rng = Tally(), random.Random(seed)
    before = nobodys_memory()
    with tempfile.TemporaryDirectory(prefix="unet-kills-") as name:
        folder = Path(name)
        for stack in "abc":
            pixels = np.random.default_rng(ord(stack)).integers(0, 256, (20, 120, 130), np.uint8)
            tifffile.imwrite(folder / f"{stack}.tif", pixels, photometric="minisblack")
        served = Served(folder)
        line = [sys.executable, "serve/client.py", *(str(folder / f"{stack}.tif") for stack in "abc"), "--quiet"]
        line += ["--url", f"localhost:{served.port}", "--resume", "--patience_s", "60", "--timeout_s", "10"]
        line += [f"--output={kind}" for kind in ("probability", "mask", "labels")]
        try:
            served.ensure()
            subprocess.run([*line, "--output_dir", str(folder / "whole")], cwd=ROOT, check=True)
            whole = contents(folder / "whole")
            while found.kills.total() < kills:
                found.runs += 1
                _segment([*line, "--output_dir", str(folder / "out")], served, found, kills, rng)
                if (left := contents(folder / "out")) != whole:
                    names = {*left, *whole}
                    wrong = sorted(name for name in names if left.get(name) != whole.get(name))
                    found.faults.append(f"run {found.runs}: {wrong[:3]} differ")
                shutil.rmtree(folder / "out")
                note(found.line())
        finally:
            served.stop()
    if left_over := nobodys_memory() - before:
        found.faults.append(f"left in shared memory: {sorted(left_over)[:3]}")
    return found


def _segment(line: Sequence[str], served: Served, found: Tally, kills: int, rng: random.Random) -> None:
    """One segmentation, killed and started again until it ends well."""
    while True:
        served.ensure()
        with subprocess.Popen(line, cwd=ROOT, stderr=subprocess.PIPE, text=True) as client:
            while client.poll() is None and found.kills.total() < kills:
                try:
                    client.wait(rng.uniform(0.3, 3.0))
                except subprocess.TimeoutExpired:
                    (role,) = rng.choices([*ROLES], [*ROLES.values()])
                    if role == "client":
                        client.kill()
                        client.wait()
                        found.kills[role] += 1
                        break
                    found.kills[role] += served.kill(role)
                    served.ensure()
            _, said = client.communicate()
        if client.returncode == 0:
            return
        if client.returncode > 0 and "Traceback" in said:
            found.faults.append(f"run {found.runs}: {said[-300:]}")


def attack_ranks(kills: int, seed: int, note: Callable[[str], None] = lambda text: None) -> Tally:
    """Kill a rank of two, or the only process, while a small network trains; then compare all weights."""
    found, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="unet-kills-") as name:
        folder = Path(name)
        trainer = _trainer(folder)
        launched = [str(Path(sys.executable).with_name("horovodrun")), "-np", "2", "--gloo", *trainer]
        lines = {"trainer": trainer, "rank": launched}
        whole: dict[str, list[np.ndarray]] = {}  # type: ignore[type-arg]
        for role, line in lines.items():
            subprocess.run([*line, str(folder / f"whole-{role}")], check=True, stdout=subprocess.DEVNULL)
            whole[role] = weights(folder / f"whole-{role}")
        while found.kills.total() < kills:
            role = min(lines, key=lambda one: found.kills[one])
            found.runs += 1
            out = folder / "out"
            _killed([*lines[role], str(out)], out, role, found, kills, rng)
            pairs = zip(weights(out), whole[role])
            worst = max(float(np.abs(one - other).max()) for one, other in pairs)
            if worst > 1e-6:
                found.faults.append(f"run {found.runs}, {role}: weights differ by {worst:.2g}")
            if hidden := [path.name for path in out.rglob(".*") if path.name != ".lock"]:
                found.faults.append(f"run {found.runs}, {role}: {hidden[:3]} left")
            shutil.rmtree(out)
            note(found.line())
    return found


def attack_export(kills: int, seed: int, note: Callable[[str], None] = lambda text: None) -> Tally:
    """Kill the exporter of a small network; then compare each network, and see that the card is of what is there."""
    found, rng = Tally(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="unet-kills-") as name:
        folder = Path(name)
        subprocess.run([*_trainer(folder), str(folder / "run")], check=True, stdout=subprocess.DEVNULL)
        line = [sys.executable, str(ROOT / "export" / "main.py"), "--model_dir", str(folder / "run"), "--no_int8"]
        line += ["--data_dir", str(folder), "--tile_sizes", "204", "--out"]
        subprocess.run([*line, str(folder / "whole")], check=True, stdout=subprocess.DEVNULL)
        whole = _networks(folder / "whole")
        while found.kills.total() < kills:
            found.runs += 1
            out = folder / "exports" / "out"
            out.parent.mkdir()
            _killed([*line, str(out)], out, "exporter", found, kills, rng)
            if (left := _networks(out)) != whole:
                wrong = sorted(name for name in {*left, *whole} if left.get(name) != whole.get(name))
                found.faults.append(f"run {found.runs}: {wrong[:3]} differ")
            if unlike := [
                one.file for one in Card.load(out).artefacts.values() if sha256_of(out / one.file) != one.sha256
            ]:
                found.faults.append(f"run {found.runs}: the card is not of {unlike[:3]}")
            if others := [path.name for path in out.parent.iterdir() if path != out and path.suffix != ".lock"]:
                found.faults.append(f"run {found.runs}: {others[:3]} left")
            shutil.rmtree(out.parent)
            note(found.line())
    return found


def _trainer(folder: Path) -> list[str]:
    """The command that trains a small network on slices that are made in a folder; ``--model_dir`` is to follow."""
    images, labels = synthetic_stack(slices=5, size=96, seed=1)
    tifffile.imwrite(folder / "train-volume.tif", images)
    tifffile.imwrite(folder / "train-labels.tif", labels * np.uint8(255))
    flags = ["--exec_mode", "train", "--data_dir", str(folder), "--base_filters", "2", "--tile_size", "188"]
    flags += ["--max_steps", str(STEPS), "--checkpoint_every", "2", "--evaluate_every", "4", "--log_every", "1"]
    flags += ["--validation_share", "0.2", "--augment", "--optimizer", "adam", "--learning_rate", "0.001"]
    flags += ["--global_batch_size", "2", "--resume"]
    return [sys.executable, str(ROOT / "train" / "main.py"), *flags, "--model_dir"]


def _networks(out: Path) -> dict[str, bytes]:
    """What an export holds, without what names the time or a measurement."""
    return {name: content if name.endswith(".onnx") else b"" for name, content in contents(out).items()}


def _killed(line: Sequence[str], out: Path, role: str, found: Tally, kills: int, rng: random.Random) -> None:
    """One run, killed and started again until it ends well."""
    most = min(kills, found.kills.total() + MOST_OF_A_RUN)
    while True:
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            if found.kills.total() < most:
                # Any moment will do; half of them fall into the start, the others into the work.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(rng.uniform(0.5, 20.0))
                working = _working(process.pid, out)
                if working:
                    rng.choice(working).kill()
                    found.kills[role] += 1
            process.wait()
        until(lambda: not [one for one in psutil.process_iter() if _is_of(one, out)], "the others end too")
        if process.returncode == 0:
            return


def _working(pid: int, out: Path) -> list[psutil.Process]:
    """The processes that do the work: of a launcher, the ranks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        return [one for one in (launcher, *launcher.children(recursive=True)) if _is_of(one, out)]
    return []


def _is_of(process: psutil.Process, out: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        mains = [str(ROOT / room / "main.py") for room in ("train", "export")]
        return str(out) in words and len(words) > 1 and words[1] in mains
    return False


def weights(folder: Path) -> list[np.ndarray]:  # type: ignore[type-arg]
    """The newest weights of a run, then the best."""
    from train.model.network import build_unet
    from train.run.folder import Run

    run, model = Run(folder), build_unet(2)
    assert run.checkpoints(model=model).restore(partial=True) == STEPS
    newest = model.get_weights()
    run.best(model).restore(partial=True)
    return [*newest, *model.get_weights()]


def main(argv: Sequence[str] | None = None) -> int:
    """Attack from the command line; the exit code is 1 if something was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.torture.kills", description="SIGKILLs of what runs.")
    parser.add_argument("--kills", type=int, default=300, help="of client, server and network (default: 300)")
    parser.add_argument("--ranks", type=int, default=60, help="of trainers and ranks (default: 60)")
    parser.add_argument("--exports", type=int, default=60, help="of the exporter (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("torture.md"), help="the counts are added to this file")
    chosen = parser.parse_args(argv)
    parts = [
        attack(count, chosen.seed, say)
        for attack, count in (
            (attack_serving, chosen.kills),
            (attack_ranks, chosen.ranks),
            (attack_export, chosen.exports),
        )
        if count
    ]
    lines = ["", "# Kills at random moments", ""]
    faults = [fault for part in parts for fault in part.faults]
    lines += [*(f"- {part.line()}" for part in parts), "", *(f"- {fault}" for fault in faults)]
    return report(lines, chosen.out, faults)


if __name__ == "__main__":
    sys.exit(main())
