"""The client's figures, each a ratio of one interleaved run: ``python serve/figures.py WHAT``.

``tensorflow``: the same stack over a TensorFlow loop that predicts tiles of 572, as the reference does.
``memory``: the client's resident memory over the number of slices, and for slices of 16k x 16k, with its curve.
``servers``: slices a second over several servers at once over those of the first alone.
``soak``: many clients at once; every answer is checked against its own input.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil
import tifffile

from serve.measure.common import MeasureError
from serve.measure.levels import counted
from serve.segment.errors import ClientError
from serve.segment.segmenter import Segmenter
from serve.volume.request import Request
from serve.volume.run import segment_volume
from unet.config import setting
from unet.files import atomic_file
from unet.files.demo import own_or_demo
from unet.geometry import plan_tiles, predict_tiled
from unet.measure import interleave, ratios, timed
from unet.names import OUTPUT
from unet.volume import page_range, read_images, read_labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CLIENT = Path(__file__).resolve().parents[1] / "client.py"
_TILE = 572
_LARGE = 16384
_SAMPLE_S = 0.05


@dataclass(frozen=True)
class FigureSettings:
    """What is measured, where and how long."""

    url: str = setting("localhost:8001", "HOST:PORT of the server's gRPC")
    servers: tuple[str, ...] = setting(
        ("localhost:8001", "localhost:9001"), "HOST:PORT of each, of `servers`", kind=str
    )
    saved_model: Path = setting(
        Path("result/saved_model"), "for `tensorflow`; demo/result/saved_model where there is none"
    )
    images: Path = setting(Path("data/train-volume.tif"), "a stack")
    labels: Path | None = setting(None, "its labels, to compare scores in `tensorflow`", kind=Path)
    pages: str = setting("24:30", "slices FIRST:LAST of it for `tensorflow`, LAST left out")
    rounds: int = setting(9, "turns that the measured things take")
    slices: tuple[int, ...] = setting((30, 300, 3000), "lengths of `memory`'s stacks", kind=int)
    side: int = setting(512, "of `memory`'s slices")
    large: bool = setting(False, "`memory` with a slice of 16k x 16k too")
    clients: int = setting(64, "of `soak`")
    seconds: float = setting(600.0, "of `soak`")
    tolerance: float = setting(0.01, "of `soak`: engines round differently in batches of other sizes")
    out: Path = setting(Path("benchmark"), "folder for what is found")

    def __post_init__(self) -> None:
        if min(self.rounds, self.side, self.clients, *self.slices) < 1 or self.seconds <= 0:
            raise MeasureError("--rounds, --slices, --side, --clients and --seconds must be positive")


@contextlib.contextmanager
def by_the_engine(*urls: str) -> Iterator[None]:
    """A measurement that counts only if the engine gave the answers, not a response cache.

    Raises:
        MeasureError: at the end, if a cache answered.
    """
    with contextlib.ExitStack() as stack:
        counts = [stack.enter_context(counted(url, "unet")) for url in urls]
        yield
        cached = sum(one().cached for one in counts)
    if cached:
        raise MeasureError(
            f"{cached} requests were answered from the response cache, so this says nothing of the engine: publish "
            "without --response_cache"
        )


def speed_ratio(taken: dict[str, list[float]], of: str, over: str) -> float:
    """How much faster ``of`` is than ``over``: the median of the rounds' ratios."""
    return statistics.median(ratios(taken[over], taken[of]))


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each of several things in each round, after one that is not measured."""
    subjects = {name: timed(run) for name, run in runs.items()}
    interleave(subjects, 1)
    return interleave(subjects, rounds)


def against_tensorflow(settings: FigureSettings) -> dict[str, Any]:
    """A stack from file to file over the trained network in TensorFlow, tile by tile of 572, file to file too."""
    import tensorflow as tf

    from unet.scores import score_stack

    saved_model = own_or_demo(settings.saved_model, "result/saved_model")
    if not (saved_model / "saved_model.pb").exists():
        raise MeasureError(f"{saved_model} is no SavedModel: name that of a training run with --saved_model")
    network = tf.saved_model.load(str(saved_model)).signatures["serving_default"]
    images = read_images(settings.images)
    pages = page_range(settings.pages, len(images))
    scored = {}

    def predict(tiles: npt.NDArray[Any]) -> npt.NDArray[Any]:
        answer = network(image=tf.constant(tiles[..., np.newaxis]))[OUTPUT].numpy()
        return np.asarray(answer[..., 0], np.float32)

    with tempfile.TemporaryDirectory() as name, Segmenter(settings.url, timeout_s=300) as segmenter:
        folder = Path(name)
        part = folder / "part.tif"
        tifffile.imwrite(part, images[pages], photometric="minisblack")

        def client() -> None:
            segment_volume(segmenter, part, Request(overwrite=True, quiet=True, picture_slice=None))

        def reference() -> None:
            images = tifffile.imread(part)
            plan = plan_tiles(images.shape[1], images.shape[2], _TILE)
            found = np.stack([predict_tiled(image, plan, predict) for image in images])
            tifffile.imwrite(folder / "tensorflow.tif", found, photometric="minisblack")

        with by_the_engine(settings.url):
            taken = interleaved({"client": client, "tensorflow": reference}, settings.rounds)
        if settings.labels is not None:
            labels = read_labels(settings.labels)[pages]
            for who, file in (("client", "part-probability.tif"), ("tensorflow", "tensorflow.tif")):
                scores = score_stack(tifffile.imread(folder / file), labels)
                scored[who] = {"v_rand": scores.best_v_rand, "v_info": scores.best_v_info}
    count = len(pages)
    return {
        "slices": count,
        "client_slices_per_s": count / statistics.median(taken["client"]),
        "tensorflow_slices_per_s": count / statistics.median(taken["tensorflow"]),
        "ratio": speed_ratio(taken, "client", "tensorflow"),
        "scores": scored,
    }


def watched(line: Sequence[str]) -> tuple[list[tuple[float, float]], float]:
    """Run a client; its resident memory over time, (s, MiB), and its peak."""
    samples: list[tuple[float, float]] = []
    started = time.monotonic()
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        about = psutil.Process(process.pid)
        while True:
            try:
                rss = about.memory_info().rss / 2**20
                if rss:  # none is left of one that has just ended
                    samples.append((time.monotonic() - started, rss))
                process.wait(_SAMPLE_S)
                break
            except subprocess.TimeoutExpired:
                continue
            except psutil.Error:
                break
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, line)
    return samples, max(rss for _, rss in samples)


def memory(settings: FigureSettings) -> dict[str, Any]:
    """The client's resident memory while it segments stacks of several lengths, and a slice of 16k x 16k."""
    side, curves = settings.side, {}
    random = np.random.default_rng(0)
    plane = random.integers(0, 256, (side, side), np.uint8)
    with tempfile.TemporaryDirectory(dir=settings.out) as name:
        cases = {f"{count} slices": (count, plane) for count in settings.slices}
        if settings.large:
            repeats = -(-_LARGE // side)
            cases[f"1 slice of {_LARGE}"] = (1, np.tile(plane, (repeats, repeats))[:_LARGE, :_LARGE])
        for title, (count, pixels) in cases.items():
            source = Path(name) / "volume.tif"
            with tifffile.TiffWriter(source) as tiff:
                for _ in range(count):
                    tiff.write(pixels, photometric="minisblack", contiguous=True, metadata=None)
            # Large pages pass without shared memory too: what the server maps is no client's memory.
            line = [sys.executable, str(_CLIENT), str(source), "--url", settings.url, "--overwrite", "--quiet"]
            curves[title], _ = watched([*line, "--timeout", "600"])
    _draw(settings.out / "memory.png", curves)
    return {title: {"peak_mib": max(rss for _, rss in curve)} for title, curve in curves.items()}


def _draw(path: Path, curves: dict[str, list[tuple[float, float]]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for title, curve in curves.items():
        end = curve[-1][0]
        axes.plot([100 * at / end for at, _ in curve], [rss for _, rss in curve], label=f"{title}, {end:.0f} s")
    axes.set(xlabel="% of the run", ylabel="client's resident memory, MiB", ylim=(0, None))
    axes.legend()
    axes.grid(alpha=0.3)
    with atomic_file(path) as aside:
        figure.savefig(aside, dpi=110, format="png")


def several_servers(settings: FigureSettings) -> dict[str, Any]:
    """Slices by one segmenter for each server at the same time, over the same slices by the first server alone."""
    images = list(np.random.default_rng(0).integers(0, 256, (4 * len(settings.servers), 512, 512), np.uint8))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(settings.servers)) as pool:
        segmenters = [stack.enter_context(Segmenter(url, timeout_s=300)) for url in settings.servers]
        if len({segmenter.interface for segmenter in segmenters}) > 1:
            raise MeasureError(f"{', '.join(settings.servers)} serve different models: publish the same one on all")

        def segment(segmenter: Segmenter, part: list[npt.NDArray[np.uint8]]) -> list[npt.NDArray[np.float32]]:
            return list(segmenter.segment(part))

        def together() -> list[npt.NDArray[np.float32]]:
            parts = [images[first :: len(segmenters)] for first in range(len(segmenters))]
            found = list(pool.map(segment, segmenters, parts))
            return [found[index % len(found)][index // len(found)] for index in range(len(images))]

        first = segment(segmenters[0], images)
        if not all(np.allclose(one, other, atol=settings.tolerance) for one, other in zip(first, together())):
            raise MeasureError(f"{', '.join(settings.servers)} answer differently: publish the same model on all")
        with by_the_engine(*settings.servers):
            taken = interleaved({"one": lambda: segment(segmenters[0], images), "together": together}, settings.rounds)
    rates = {f"{who}_slices_per_s": len(images) / statistics.median(each) for who, each in taken.items()}
    return {"servers": len(segmenters), **rates, "ratio": speed_ratio(taken, "together", "one")}


def soak(settings: FigureSettings) -> dict[str, Any]:
    """Many clients at once for a while, each with slices of its own; every answer is compared with the first one."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (100, 100), np.uint8) for _ in range(settings.clients)]
    with Segmenter(settings.url, timeout_s=300) as segmenter:
        expected = list(segmenter.segment(images))
    if len({answer.tobytes() for answer in expected}) < len(images):
        raise MeasureError("two inputs have one answer, and swapped ones would go unnoticed: serve a trained network")
    until, lock = time.monotonic() + settings.seconds, threading.Lock()
    counts = {"answers": 0, "wrong": 0}
    gave_up: Counter[str] = Counter()
    process = psutil.Process()
    rss: list[float] = []

    def client(index: int) -> None:
        order = np.random.default_rng(index)
        with Segmenter(settings.url, timeout_s=300) as segmenter:
            while time.monotonic() < until:
                which_ones = order.integers(0, len(images), 4)
                for which, answer in zip(which_ones, segmenter.segment([images[one] for one in which_ones])):
                    right = np.allclose(answer, expected[which], atol=settings.tolerance)
                    with lock:
                        counts["answers"] += 1
                        counts["wrong"] += not right
                with lock:
                    rss.append(process.memory_info().rss / 2**20)

    with counted(settings.url, "unet") as seen, ThreadPoolExecutor(settings.clients) as pool:
        for future in [pool.submit(client, index) for index in range(settings.clients)]:
            try:
                future.result()
            except ClientError as error:  # what the others found still counts
                gave_up[str(error)] += 1
    with contextlib.suppress(ClientError):  # a server that has gone tells nothing
        counts["from_cache"] = seen().cached
    third = len(rss) // 3
    return {
        "clients": settings.clients,
        "seconds": settings.seconds,
        **counts,
        "gave_up": dict(gave_up),
        "rss_mib_second_third": max(rss[third : 2 * third], default=0.0),
        "rss_mib_last_third": max(rss[2 * third :], default=0.0),
    }


FIGURES = {
    "tensorflow": against_tensorflow,
    "memory": memory,
    "servers": several_servers,
    "soak": soak,
}
