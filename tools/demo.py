"""The main job from end to end, by the commands that a user would type: ``make demo``."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tools import recipe
from tools.own_folder import clear_own
from tools.progress import Progress, follow, in_words
from unet.errors import UnetError, command, say
from unet.files import read_json
from unet.processes import MemoryWatch, child, free_ports
from unet.volume import StackReader, StackWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
LOGS = "logs"
LOG_NAME = "log.json"


class DemoError(UnetError):
    """A step of the demo that did not succeed."""


@dataclass
class Demo:
    """The demo's files, its commands, and what they came to.

    Attributes:
        flags: of the trainer.
        minutes: training takes no longer.
        durations_s: of the steps done.
        slowness: how much longer the other steps take here than `recipe.USUAL_S` has it.
    """

    data_dir: Path
    out: Path
    repository: Path
    flags: Mapping[str, str]
    minutes: float
    export_flags: Sequence[str]
    benchmark_flags: Sequence[str]
    durations_s: dict[str, float] = field(default_factory=dict)
    slowness: float = 1.0

    @property
    def results(self) -> Path:
        """What the trainer writes."""
        return self.out / "result"

    @property
    def artefacts(self) -> Path:
        """What the exporter writes."""
        return self.out / "artefacts"

    def usual_s(self, title: str) -> float:
        """Seconds that a step is expected to take here."""
        return recipe.USUAL_S[title] * (1.0 if title in recipe.CLOCKED else self.slowness)

    def rest_s(self) -> float:
        """Seconds that the steps after the training are expected to take."""
        return sum(self.usual_s(title) for title in recipe.USUAL_S if title != "synthetic stack")

    def prepare(self, size: int) -> None:
        """Clear what a former demo left, and take the synthetic stack where there are no real slices."""
        clear_own(self.out, "demo", DemoError)
        if (self.data_dir / "train-volume.tif").exists():
            say(f"training on the slices in {self.data_dir}")
            return
        say(
            f"{self.data_dir / 'train-volume.tif'} does not exist: taking a synthetic stack instead. {recipe.REAL_DATA}"
        )
        self.data_dir = self.out / "data"
        self.run("synthetic stack", "python", "-m", "unet.phantom", "--out", self.data_dir, "--size", str(size))

    def summarise(self, peak_bytes: int) -> None:
        """Where everything is, how long it took and how much memory."""
        say("\n== what there is now")
        found = (
            (self.results / "saved_model", "the trained network"),
            (self.artefacts, "ONNX, FP16 ONNX and the card with their history"),
            (self.repository, "what Triton serves"),
            (self.out / "test-volume-probability.tif", "non-membrane probability of the test stack"),
            (self.out / "test-volume-overlay.png", "its first slice with the membrane drawn over it"),
            (self.out / "benchmark", "the benchmark's tables"),
            (self.out / LOGS, "what each step said"),
        )
        width = max(len(str(path)) for path, _ in found)
        for path, meaning in found:
            say(f"{path!s:{width}}  {meaning}")
        total = sum(self.durations_s.values())
        say(", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.durations_s.items()))
        say(f"{total / 60:.1f} minutes in all, {peak_bytes / 2**30:.2f} GiB of resident memory at most")
        say("next: `make report` draws it all on one page, `make serve` serves the network, `make help` lists the rest")

    def run(self, title: str, *words: str | Path) -> None:
        """Say and run one command, with a sign of life while it says nothing; a failure ends the demo."""
        progress = Progress(title, self.usual_s(title))
        with self._step(title, progress, words) as (process, log):
            for text in follow(process, log):
                if text is None:
                    progress.pulse()
                else:
                    progress.line(text)

    @contextlib.contextmanager
    def _step(
        self, title: str, progress: Progress, words: Sequence[str | Path]
    ) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
        """A command under way and the file that takes its output.

        Raises:
            DemoError: it failed.
        """
        line = [str(word) for word in words]
        say(f"\n== {title}\n$ {shlex.join(line)}")
        folder = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3"}
        log = self.out / LOGS / f"{title.replace(' ', '-').lower()}.log"
        log.parent.mkdir(exist_ok=True)
        try:
            with child(line, log=log, environment=environment) as process:
                yield process, log
                code = process.wait()
        finally:
            progress.clear()
        self.durations_s[title] = progress.elapsed_s
        if code:
            raise DemoError(f"the step {title!r} failed (exit code {code}); everything that it said is in {log}")

    def train(self) -> None:
        """As many steps as fit into the minutes, in one process, with progress from its log."""
        words = recipe.trainer_line(self.data_dir, self.results, {**self.flags, "max_minutes": f"{self.minutes:g}"})
        progress = Progress("train", self.minutes * 60)
        share, left_s, note, total = None, None, "starting", 0
        with self._step("train", progress, words) as (process, log):
            for text in follow(process, self.results / LOG_NAME):
                if text is None:
                    progress.pulse(share, left_s, note)
                    continue
                event = json.loads(text.removeprefix("DLLL "))
                step, data = event["step"], event["data"]
                if "step_s" in data:
                    total = data["max_steps"]
                    self._announce(progress, step, total, data["step_s"])
                if "img_per_s" in data:
                    if total:
                        share, left_s = step / total, (total - step) * int(self.flags["batch_size"]) / data["img_per_s"]
                    note = f"step {step}, loss {data['loss']:.4f}, {data['img_per_s']:.1f} img/s"
                if "dice" in data:
                    progress.line(f"   step {step}: validation Dice {data['dice']:.4f}")
            if process.wait():
                progress.line(log.read_text(encoding="utf-8", errors="replace")[-3000:])

    def _announce(self, progress: Progress, step: int, total: int, step_s: float) -> None:
        """Say how long everything will take, now that the machine's speed is known."""
        # The other steps are convolutions only in part: on machines of both kinds they follow the root.
        self.slowness = max(1.0, math.sqrt(step_s / recipe.REFERENCE_STEP_S))
        left_s = (total - step) * step_s
        progress.line(
            f"   a step takes {step_s:.2f} s here: {total} steps, {in_words(left_s)} more of training, "
            f"then {in_words(self.rest_s())} until everything is done"
        )

    def ranks(self) -> None:
        """A few steps of a tiny network on two Horovod ranks, to show that they train together on this machine."""
        words = recipe.trainer_line(self.data_dir, self.out / "two-ranks", recipe.RANK_FLAGS)
        self.run("two Horovod ranks", "horovodrun", "-np", str(recipe.RANKS), "--gloo", *words)

    def export(self) -> None:
        """SavedModel to ONNX, FP16 and the fastest engine here that keeps the scores, each compared with the last."""
        self.run(
            "export",
            *("python", "export/main.py", "--model_dir", self.results, "--out", self.artefacts),
            *("--data_dir", self.data_dir),
            *self.export_flags,
        )

    def publish(self) -> None:
        """Make the artefacts the next version of the served model."""
        self.run(
            "publish",
            *("python", "serve/repository.py", "--artefacts", self.artefacts, "--model_repository", self.repository),
        )

    @contextlib.contextmanager
    def server(self) -> Iterator[str]:
        """The real Triton on free ports of the loopback interface; yields the gRPC address."""
        ports = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3)))
        triton: tuple[str | Path, ...] = ("python", "serve/triton.py")
        state: tuple[str | Path, ...] = ("--state_dir", self.out / "triton")
        flags = [word for name, port in ports.items() for word in (f"--{name}", str(port))]
        try:
            self.run("start Triton", *triton, "start", "--model_repository", self.repository, *flags, *state)
            yield f"localhost:{ports['grpc_port']}"
        finally:
            self.run("stop Triton", *triton, "stop", *state)

    def segment_and_score(self, url: str) -> None:
        """Segment the test stack, and the held-out slices, which are then scored."""
        test = self.data_dir / "test-volume.tif"
        self.run("segment", "python", "serve/client.py", test, "--url", url, "--output_dir", self.out, "--overwrite")
        images, labels = self._extract_held_out()
        self.run(
            "segment held-out slices",
            *("python", "serve/client.py", images, "--url", url, "--output_dir", self.out, "--overwrite"),
        )
        self.run("score", "python", "-m", "unet.scores", self.out / "held-out-volume-probability.tif", labels)

    def _extract_held_out(self) -> tuple[Path, Path]:
        """Write the slices that training did not see as a stack of their own, with their labels."""
        pages = read_json(self.results / "config.json")["held_out"]["train-volume.tif"]
        paths = self.out / "held-out-volume.tif", self.out / "held-out-labels.tif"
        for source, target in zip(("train-volume.tif", "train-labels.tif"), paths):
            with StackReader(self.data_dir / source) as reader, StackWriter(target, reader, reader.dtype) as writer:
                for page in pages:
                    writer.append(reader[page])
        return paths

    def benchmark(self, url: str) -> None:
        """Images per second through Triton, by our client and by perf_analyzer."""
        self.run(
            "benchmark",
            *("python", "serve/benchmark.py", "--url", url, "--artefacts", self.artefacts),
            *("--out", self.out / "benchmark"),
            *self.benchmark_flags,
        )


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when every step succeeded."""
    parser = argparse.ArgumentParser(prog="tools.demo", description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder with train-volume.tif and so on")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that the demo writes")
    parser.add_argument("--model_repository", type=Path, default=Path("model_repository"), help="where it publishes")
    default = f"{recipe.FLAGS['max_steps']} steps, at most {recipe.MINUTES:g} minutes"
    parser.add_argument("--minutes", type=float, help=f"of training (default: {default})")
    parser.add_argument("--quick", action="store_true", help="a tiny network for a few steps: checks, shows nothing")
    chosen = parser.parse_args(argv)
    data_dir, out, repository = (path.resolve() for path in (chosen.data_dir, chosen.out, chosen.model_repository))
    os.chdir(ROOT)
    flags = recipe.QUICK_FLAGS if chosen.quick else recipe.FLAGS
    if chosen.minutes is not None:
        if not chosen.minutes > 0:
            parser.error("--minutes must be positive")
        flags = {**flags, "max_steps": recipe.NO_LIMIT}
    demo = Demo(
        data_dir=_relative(data_dir),
        out=_relative(out),
        repository=_relative(repository),
        flags=flags,
        minutes=chosen.minutes or recipe.MINUTES,
        export_flags=recipe.QUICK_EXPORT if chosen.quick else (),
        benchmark_flags=recipe.QUICK_BENCHMARK if chosen.quick else recipe.BENCHMARK,
    )
    with MemoryWatch() as memory:
        demo.prepare(size=256 if chosen.quick else 512)
        say(
            f"this takes at most {demo.minutes:g} minutes of training, then about {in_words(demo.rest_s())} for the "
            "rest; how long exactly is said after the first steps"
        )
        demo.train()
        demo.ranks()
        demo.export()
        demo.publish()
        with demo.server() as url:
            demo.segment_and_score(url)
            demo.benchmark(url)
    demo.summarise(memory.peak)
    return 0


def _relative(path: Path) -> Path:
    """A path inside the project as seen from its root: shorter to read and to type again."""
    return path.relative_to(ROOT) if ROOT in path.parents else path


if __name__ == "__main__":
    sys.exit(main())
