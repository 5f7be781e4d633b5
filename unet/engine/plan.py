"""A TensorRT plan alone, without Triton: ``python -m unet.engine.plan --artefacts artefacts``.

For parity and for the benchmark's "engine alone" row on a GPU. Needs TensorRT, pycuda and the GPU that the plan was
built for; no plan has run on a GPU yet. CUDA graphs are not offered: pycuda 2026.1 has no call for them.
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
from unet.card.records import gpu_device
from unet.engine import EngineError
from unet.engine.device import Gpu, driver, gpu
from unet.engine.library import BuildLog, load_library, make_logger
from unet.engine.targets import same_release
from unet.errors import command, say
from unet.files import write_json
from unet.geometry import output_size
from unet.measure import markdown
from unet.names import INPUT, OUTPUT, PLAN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    import tensorrt
    from numpy.typing import NDArray

    from unet.engine.library import Library

BATCH_SIZES = (1, 8, 16)
_TYPES = {INPUT: np.uint8, OUTPUT: np.float16}


def check_fit(facts: dict[str, Any], tensorrt: str, here: Gpu, release: str) -> None:
    """Refuse a plan of another GPU or another TensorRT: a plan fits only those that built it.

    Args:
        facts: what the card knows of the plan.
        tensorrt: the release that built it.
        here: this machine's GPU.
        release: this machine's TensorRT.

    Raises:
        EngineError: naming both sides.
    """
    built = str(facts.get("compute_capability", "an unknown one"))
    if built != here.compute_capability:
        raise EngineError(
            f"the plan was built for compute capability {built}, this GPU ({here.name}) has {here.compute_capability}: "
            "build it here with python -m export.plan.build"
        )
    if not same_release(tensorrt, release):
        raise EngineError(
            f"the plan was built by TensorRT {tensorrt}, this machine has {release}: build it here with "
            "python -m export.plan.build"
        )


class PlanRunner:
    """A loaded plan with pinned memory and a stream of its own. Use it as a context manager, from one thread.

    Attributes:
        tile_sizes: that the plan has a profile for, in the profiles' order.
        profiles: least, usual and largest shape of each.
        max_batch_size: that every profile takes.
        context_bytes: of the GPU's memory that one execution context takes, weights left out.
    """

    def __init__(self, plan: bytes, trt: Library) -> None:
        """Load a serialized plan, proven or not.

        Args:
            plan: what TensorRT built on this machine's kind of GPU.
            trt: the library, see `load_library`.

        Raises:
            EngineError: there is no GPU, or it is no plan that this TensorRT loads there.
        """
        self._cuda, self._log = driver(), BuildLog()
        gpu()
        self._context = self._cuda.Device(0).retain_primary_context()
        self._context.push()
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._context.pop)
        try:
            self._load(trt.Runtime(make_logger(trt, self._log)), plan)
        except BaseException:
            # The caller never gets the runner, so nobody else can close it.
            self.close()
            raise

    @classmethod
    def load(cls, artefacts: Path) -> PlanRunner:
        """Load the plan that a card lists.

        Raises:
            CardError: the plan is missing, not what its card says, or not proven on this kind of GPU.
            EngineError: there is no GPU, the plan is for another GPU or TensorRT, or it cannot be loaded.
        """
        card = Card.load(artefacts)
        card.verify(PLAN)
        entry = card.artefacts[PLAN]
        trt, here = load_library("tensorrt"), gpu()
        check_fit(entry.facts, entry.versions.get("tensorrt", "an unknown release"), here, trt.__version__)
        return cls(card.verify_proven(PLAN, gpu_device(here.compute_capability)).read_bytes(), trt)

    def _load(self, runtime: tensorrt.Runtime, plan: bytes) -> None:
        """Load the plan and give its tensors memory for the largest batch of the largest tile."""
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineError(f"TensorRT cannot load the plan: {self._log.last_error}")
        self._read_profiles(self._engine)
        self._execution = self._engine.create_execution_context()
        if self._execution is None:
            raise EngineError(f"the GPU cannot hold what the plan needs to run: {self._log.last_error}")
        self.context_bytes = int(self._engine.device_memory_size_v2)
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

    def _read_profiles(self, engine: tensorrt.ICudaEngine) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if sorted(names) != sorted(_TYPES):
            raise EngineError(f"the plan has the tensors {', '.join(names)} where {', '.join(_TYPES)} are due")
        shapes = [engine.get_tensor_profile_shape(INPUT, index) for index in range(engine.num_optimization_profiles)]
        self.profiles = [
            tuple(tuple(int(shape[axis]) for axis in range(len(shape))) for shape in profile) for profile in shapes
        ]
        self.tile_sizes = tuple(profile[2][2] for profile in self.profiles)
        self.max_batch_size = min(profile[2][0] for profile in self.profiles)

    def _require(self, done: bool, refusal: str) -> None:
        if not done:
            raise EngineError(
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
            EngineError: the plan has no profile for these tiles, or TensorRT reports an error.
        """
        if image.dtype != np.uint8 or image.ndim != 4 or image.shape[1] != 1 or image.shape[2] != image.shape[3]:
            raise EngineError(
                f"tiles must be square, uint8 [N, 1, S, S], these are {image.dtype} of {list(image.shape)}"
            )
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
            EngineError: as `infer`.
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
            raise EngineError(
                f"the plan takes tiles of {', '.join(map(str, self.tile_sizes))} in batches of 1 to "
                f"{self.max_batch_size}, not {batch} of {size}: build another"
            )
        if size != self._tile_size:
            self._change_profile(size)
        self._require(
            self._execution.set_input_shape(INPUT, self._shape(INPUT, batch, size)),
            f"does not take {batch} tiles of {size}",
        )

    def _change_profile(self, size: int) -> None:
        refusal = f"does not change to the profile of tiles of {size}"
        # Until the change is done no profile is known to be set.
        self._tile_size = 0
        try:
            changed = self._execution.set_optimization_profile_async(self.tile_sizes.index(size), self._stream.handle)
        except RuntimeError:  # what the bindings make of a refusal
            changed = False
        self._require(changed, refusal)
        self._stream.synchronize()
        self._tile_size = size

    def _execute(self) -> None:
        if not self._execution.execute_async_v3(self._stream.handle):
            raise EngineError(f"TensorRT could not run the plan: {self._log.last_error}")

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
        for batch in (one for one in BATCH_SIZES if one <= runner.max_batch_size):
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
    with PlanRunner.load(chosen.artefacts) as runner:
        rows = benchmark(runner, chosen.seconds)
    write_json(chosen.out, {"gpu": gpu().name, "rows": rows})
    say(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
