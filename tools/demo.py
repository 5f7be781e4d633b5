"""The main job from end to end, by the commands that a user would type: ``make demo``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from unet.errors import UnetError, command, say
from unet.processes import MemoryWatch, child, free_ports
from unet.volume import StackReader, StackWriter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
# Marks a folder as one that the demo made and may clear.
MARK = ".unet-demo"

# Of a stack of 30 slices, fold 4 is slices 24 to 29.
RECIPE = {
    "crossvalidation_idx": "4",
    "base_filters": "16",
    "tile_size": "444",
    "max_steps": "1600",
    "optimizer": "adam",
    "learning_rate": "0.001",
    "lr_schedule": "cosine",
    "lr_warmup_steps": "100",
    "weight_decay": "0",
    "dropout": "0.2",
    "membrane_weight": "2",
    "evaluate_every": "400",
    "augment": "",
    "use_amp": "",
}
QUICK_FLAGS = {
    **RECIPE,
    "base_filters": "4",
    "tile_size": "236",
    "max_steps": "20",
    "evaluate_every": "10",
    "log_every": "10",
}

REAL_DATA = (
    "The real slices (ISBI 2012, free for non-commercial work) come by `.venv/bin/python train/download_dataset.py "
    "--data_dir data`; then run `make demo` again."
)


class DemoError(UnetError):
    """A step of the demo that did not succeed."""


@dataclass
class Demo:
    """The demo's files, its commands, and what they came to."""

    data_dir: Path
    out: Path
    repository: Path
    flags: Mapping[str, str]
    batch_sizes: Sequence[int]
    durations_s: dict[str, float] = field(default_factory=dict)

    @property
    def results(self) -> Path:
        """What the trainer writes."""
        return self.out / "result"

    @property
    def artefacts(self) -> Path:
        """What the exporter writes."""
        return self.out / "artefacts"

    def prepare(self, size: int) -> None:
        """Clear what a former demo left, and take the synthetic stack where there are no real slices."""
        if self.out.exists() and any(self.out.iterdir()):
            if not (self.out / MARK).exists():
                raise DemoError(f"{self.out} holds something that is not a former demo's: name another --out")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / MARK).touch()
        if (self.data_dir / "train-volume.tif").exists():
            say(f"training on the slices in {self.data_dir}")
            return
        say(f"{self.data_dir / 'train-volume.tif'} does not exist: taking a synthetic stack instead. {REAL_DATA}")
        self.data_dir = self.out / "data"
        self.run("synthetic stack", "python", "-m", "unet.phantom", "--out", self.data_dir, "--size", str(size))

    def summarise(self, peak_bytes: int) -> None:
        """Where everything is, how long it took and how much memory."""
        say("\n== what there is now")
        for path, meaning in (
            (self.results / "saved_model", "the trained network"),
            (self.artefacts, "ONNX, FP16 ONNX and the card with their history"),
            (self.repository, "what Triton serves"),
            (self.out / "test-volume-probability.tif", "non-membrane probability of the test stack"),
            (self.out / "test-volume-overlay.png", "its first slice with the membrane drawn over it"),
            (self.out / "benchmark", "the benchmark's tables"),
            (self.out / "train.log", "what the trainer said"),
        ):
            say(f"{path!s:42} {meaning}")
        total = sum(self.durations_s.values())
        say(", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.durations_s.items()))
        say(f"{total / 60:.1f} minutes in all, {peak_bytes / 2**30:.2f} GiB of resident memory at most")

    def run(self, title: str, *words: str | Path, log: Path | None = None) -> None:
        """Say and run one command; a failure ends the demo."""
        say(f"\n== {title}")
        started = time.monotonic()
        with self._start(words, log) as process:
            code = process.wait()
        self._finish(title, started, code, words, log)

    def _start(self, words: Sequence[str | Path], log: Path | None) -> Any:
        line = [str(word) for word in words]
        say(f"$ {shlex.join(line)}")
        folder = str(Path(sys.executable).parent)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "TF_CPP_MIN_LOG_LEVEL": "3"}
        return child(line, log=log, environment=environment)

    def _finish(self, title: str, started: float, code: int, words: Sequence[str | Path], log: Path | None) -> None:
        self.durations_s[title] = time.monotonic() - started
        if code:
            if log is not None:
                say(log.read_text(encoding="utf-8", errors="replace")[-3000:])
            raise DemoError(f"`{words[0]} {words[1]} ...` ended with exit code {code}; what it said is above")

    def train(self) -> None:
        """Train on two Horovod ranks, with a bar fed from the run's log."""
        say(f"\n== train ({RANKS} Horovod ranks)")
        started = time.monotonic()
        words: tuple[str | Path, ...] = (
            *("horovodrun", "-np", str(RANKS), "--gloo", "python", "train/main.py", "--exec_mode", "train"),
            *("--data_dir", self.data_dir, "--model_dir", self.results),
            *(word for name, value in self.flags.items() for word in (f"--{name}", value) if word),
        )
        log = self.out / "train.log"
        with self._start(words, log) as process:
            self._follow(process)
            code = process.wait()
        self._finish("train", started, code, words, log)

    def _follow(self, process: Any) -> None:
        """Show the trainer's progress until it ends."""
        with tqdm(total=int(self.flags["max_steps"]), unit="step", disable=None) as bar:
            for event in follow_log(self.results / "log.json", process):
                step, data = event["step"], event["data"]
                if isinstance(step, int):
                    bar.update(step - bar.n)
                if "loss" in data and isinstance(step, int):
                    bar.set_postfix(loss=f"{data['loss']:.4f}")
                    if bar.disable:
                        say(f"step {step} of {bar.total}: loss {data['loss']:.4f}, {data['img_per_s']:.2f} img/s")
                if "dice" in data:
                    bar.write(f"step {step}: held-out Dice {data['dice']:.4f}")

    def export(self) -> None:
        """SavedModel to ONNX, FP16 and this machine's engine, each compared with the one before."""
        self.run(
            "export",
            *("python", "export/main.py", "--model_dir", self.results, "--out", self.artefacts),
            *("--data_dir", self.data_dir),
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
        pages = json.loads((self.results / "config.json").read_text(encoding="utf-8"))["held_out"]["train-volume.tif"]
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
            *("--batch_sizes", *(str(size) for size in self.batch_sizes)),
        )


def follow_log(path: Path, process: Any) -> Iterator[dict[str, Any]]:
    """The events of a run's ``log.json``, as they are written, until ``process`` has ended."""
    position = 0
    while True:
        ended = process.poll() is not None
        if path.exists():
            with path.open(encoding="utf-8") as stream:
                stream.seek(position)
                while (line := stream.readline()).endswith("\n"):
                    position = stream.tell()
                    yield json.loads(line[len("DLLL ") :])
        if ended:
            return
        # The wait for the process is the clock: it returns at once when the process ends.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when every step succeeded."""
    parser = argparse.ArgumentParser(prog="tools.demo", description=__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder with train-volume.tif and so on")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that the demo writes")
    parser.add_argument("--model_repository", type=Path, default=Path("model_repository"), help="where it publishes")
    parser.add_argument("--quick", action="store_true", help="a tiny network for a few steps: checks, shows nothing")
    chosen = parser.parse_args(argv)
    data_dir, out, repository = (path.resolve() for path in (chosen.data_dir, chosen.out, chosen.model_repository))
    os.chdir(ROOT)
    demo = Demo(
        data_dir=_relative(data_dir),
        out=_relative(out),
        repository=_relative(repository),
        flags=QUICK_FLAGS if chosen.quick else RECIPE,
        batch_sizes=(1,) if chosen.quick else (1, 8, 16),
    )
    with MemoryWatch() as memory:
        demo.prepare(size=256 if chosen.quick else 512)
        demo.train()
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
