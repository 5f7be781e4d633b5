"""A TensorRT plan alone, without Triton: ``python -m unet.engine.plan --artefacts artefacts``.

For parity and for the benchmark's "engine alone" row on a GPU. Needs TensorRT, pycuda and the GPU that the plan was
built for; nothing of this module has run on a GPU yet. CUDA graphs are not offered: pycuda 2026.1 has no call for them.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from unet.card import Card
from unet.engine.device import Gpu, driver, gpu
from unet.engine.library import BuildLog, load_library, make_logger
from unet.errors import UnetError, command, say
from unet.files import write_json
from unet.geometry import output_size
from unet.measure import markdown
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import tensorrt
    from numpy.typing import NDArray

BATCH_SIZES = (1, 8, 16)
_TYPES = {INPUT: np.uint8, OUTPUT: np.float16}


class EngineRunError(UnetError):
    """A plan that cannot be run here."""


def check_fit(facts: dict[str, Any], tensorrt: str, here: Gpu, release: str) -> None:
    """Refuse a plan of another GPU or another TensorRT: a plan fits only those that built it.

    Args:
        facts: what the card knows of the plan.
        tensorrt: the release that built it.
        here: this machine's GPU.
        release: this machine's TensorRT.

    Raises:
        EngineRunError: naming both sides.
    """
    built = str(facts.get("compute_capability", "an unknown one"))
    if built != here.compute_capability:
        raise EngineRunError(
            f"the plan was built for compute capability {built}, this GPU ({here.name}) has {here.compute_capability}: "
            "build it here with python -m export.plan.build"
        )
    if tensorrt != release:
        raise EngineRunError(
            f"the plan was built by TensorRT {tensorrt}, this machine has {release}: build it here with "
            "python -m export.plan.build"
        )


class PlanRunner:
    """A loaded plan with pinned memory and a stream of its own. Use it as a context manager, from one thread.

    Attributes:
        tile_sizes: that the plan has a profile for, in the profiles' order.
        max_batch_size: of every profile.
    """

    def __init__(self, artefacts: Path) -> None:
        """Load the plan that a card lists.

        Raises:
            CardError: the plan is missing or not what its card says.
            EngineRunError: there is no GPU, the plan is for another GPU or TensorRT, or it cannot be loaded.
        """
        card = Card.load(artefacts)
        path, entry = card.verify("plan"), card.artefacts["plan"]
        trt, here = load_library("tensorrt"), gpu()
        check_fit(entry.facts, entry.versions.get("tensorrt", "an unknown release"), here, trt.__version__)
        self._cuda, self._log = driver(), BuildLog()
        self.tile_sizes, self.max_batch_size = card.tile_sizes, int(entry.facts["profiles"][0][2][0])
        self._context = self._cuda.Device(0).retain_primary_context()
        self._context.push()
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._context.pop)
        try:
            self._load(trt.Runtime(make_logger(trt, self._log)), path)
        except BaseException:
            # The caller never gets the runner, so nobody else can close it.
            self.close()
            raise

    def _load(self, runtime: tensorrt.Runtime, path: Path) -> None:
        """Load the plan and give its tensors memory for the largest batch of the largest tile."""
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise EngineRunError(f"{path} cannot be loaded: {self._log.last_error}")
        self._execution = self._engine.create_execution_context()
        if self._execution is None:
            raise EngineRunError(f"the GPU cannot hold what {path} needs to run: {self._log.last_error}")
        self._stream = self._cuda.Stream()
        largest = max(self.tile_sizes)
        shapes = {name: self._shape(name, self.max_batch_size, largest) for name in _TYPES}
        self._host = {name: self._cuda.pagelocked_empty(shapes[name], kind) for name, kind in _TYPES.items()}
        self._device = {name: self._cuda.mem_alloc(array.nbytes) for name, array in self._host.items()}
        for name in _TYPES:
            self._require(
                self._execution.set_tensor_address(name, int(self._device[name])), f"takes no memory for {name}"
            )
        self._tile_size = 0

    def _require(self, done: bool, refusal: str) -> None:
        if not done:
            raise EngineRunError(
                f"TensorRT {refusal} ({self._log.last_error}): build the plan again with python -m export.plan.build"
            )

    @staticmethod
    def _shape(name: str, batch: int, size: int) -> tuple[int, int, int, int]:
        side = size if name == INPUT else output_size(size)
        return (batch, 1, side, side)

    def infer(self, image: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Segment tiles of one size.

        Args:
            image: uint8 [N, 1, S, S], S one of `tile_sizes`, N at most `max_batch_size`.

        Returns:
            float16 [N, 1, S - 184, S - 184], the probability of "not membrane".

        Raises:
            EngineRunError: the plan has no profile for these tiles, or TensorRT reports an error.
        """
        batch, size = image.shape[0], image.shape[2]
        self._prepare(batch, size)
        source = self._host[INPUT].reshape(-1)[: image.size]
        source[:] = image.reshape(-1)
        shape = self._shape(OUTPUT, batch, size)
        target = self._host[OUTPUT].reshape(-1)[: int(np.prod(shape))]
        self._cuda.memcpy_htod_async(self._device[INPUT], source, self._stream)
        self._execute()
        self._cuda.memcpy_dtoh_async(target, self._device[OUTPUT], self._stream)
        self._stream.synchronize()
        result: NDArray[np.float16] = target.reshape(shape).copy()
        return result

    def latencies_s(self, batch: int, size: int, seconds: float, warm_up: int = 10) -> list[float]:
        """Seconds of each pass over at least so many seconds, copies to and from the GPU included.

        Raises:
            EngineRunError: as `infer`.
        """
        image = np.random.default_rng(0).integers(0, 256, self._shape(INPUT, batch, size), np.uint8)
        for _ in range(warm_up):
            self.infer(image)
        found: list[float] = []
        started = time.perf_counter()
        while (now := time.perf_counter()) - started < seconds or not found:
            self.infer(image)
            found.append(time.perf_counter() - now)
        return found

    def _prepare(self, batch: int, size: int) -> None:
        if size not in self.tile_sizes or not 1 <= batch <= self.max_batch_size:
            raise EngineRunError(
                f"the plan takes tiles of {', '.join(map(str, self.tile_sizes))} in batches of 1 to "
                f"{self.max_batch_size}, not {batch} of {size}: build another"
            )
        if size != self._tile_size:
            self._require(
                self._execution.set_optimization_profile_async(self.tile_sizes.index(size), self._stream.handle),
                f"does not change to the profile of tiles of {size}",
            )
            self._stream.synchronize()
            self._tile_size = size
        self._require(
            self._execution.set_input_shape(INPUT, self._shape(INPUT, batch, size)),
            f"does not take {batch} tiles of {size}",
        )

    def _execute(self) -> None:
        if not self._execution.execute_async_v3(self._stream.handle):
            raise EngineRunError(f"TensorRT could not run the plan: {self._log.last_error}")

    def close(self) -> None:
        """Give everything on the GPU back."""
        for name in ("_execution", "_engine", "_device", "_host", "_stream"):
            self.__dict__.pop(name, None)
        self._stack.close()

    def __enter__(self) -> PlanRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def benchmark(runner: PlanRunner, seconds: float) -> list[dict[str, float]]:
    """Images per second and latency percentiles of the plan alone, at batch 1, 8 and 16 of each tile size."""
    rows = []
    for size in runner.tile_sizes:
        for batch in BATCH_SIZES:
            taken = np.array(runner.latencies_s(batch, size, seconds))
            p50, p95, p99 = (float(value) * 1e3 for value in np.percentile(taken, (50, 95, 99)))
            rate = batch * len(taken) / float(taken.sum())
            rows.append(
                {"tile_size": size, "batch_size": batch, "img_per_s": rate, "p50_ms": p50, "p95_ms": p95, "p99_ms": p99}
            )
    return rows


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """What ``benchmark`` found, as Markdown."""
    rates = ("img_per_s", "p50_ms", "p95_ms", "p99_ms")
    lines = [
        [f"{row['tile_size']:.0f}", f"{row['batch_size']:.0f}", *(f"{row[name]:.2f}" for name in rates)] for row in rows
    ]
    return markdown(["tile", "batch", "img/s", "p50 ms", "p95 ms", "p99 ms"], lines)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure a plan from the command line."""
    arguments = argparse.ArgumentParser(
        prog="python -m unet.engine.plan",
        description="Images per second of a TensorRT plan alone, copies included.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    arguments.add_argument(
        "--artefacts", type=Path, default=Path("artefacts"), help="folder with the plan and its card"
    )
    arguments.add_argument("--seconds", type=float, default=5, help="how long to measure each batch size")
    arguments.add_argument("--out", type=Path, default=Path("engine.json"), help="file for the figures")
    chosen = arguments.parse_args(argv)
    with PlanRunner(chosen.artefacts) as runner:
        rows = benchmark(runner, chosen.seconds)
    write_json(chosen.out, {"gpu": gpu().name, "rows": rows})
    say(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
