"""TensorRT and pycuda by their contract: what their bindings promise and how they fail, on a network that really runs.

The names and argument names are those of the real bindings, see test_contract.py; so are the errors: a profile that
does not exist raises RuntimeError, what cannot be loaded or made is None, all other refusals are False. Work that is
put into a stream happens when the stream is waited for, so that whoever reads too early reads old bytes. The "GPU"
computes with ONNX Runtime.
"""

from __future__ import annotations

import enum
import json
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from unet.engine.cpu import CpuEngine, EngineChoice

Shape = tuple[int, ...]
HEADER = b"a plan of the contract\n"


class Faults:
    """What goes wrong on this "GPU": a test sets it, and the next test finds it reset."""

    answer: Callable[[Any], Any] = staticmethod(lambda answer: answer)
    no_timing_cache = False
    no_context = False
    no_plan = False
    current: Faults


Faults.current = Faults()


class CudaError(Exception):
    """pycuda.driver.Error."""


class Cuda(types.ModuleType):
    """pycuda.driver."""

    Error = CudaError

    def __init__(self, capability: tuple[int, int] = (7, 0)) -> None:  # noqa: C901 - classes that share one machine
        super().__init__("pycuda.driver")
        self.contexts: list[Any] = []
        self.allocated: dict[int, bytearray] = {}
        self.streams: dict[int, list[Callable[[], None]]] = {}
        cuda, address = self, iter(range(4096, 1 << 30, 4096))

        def need_context() -> None:
            if not cuda.contexts:
                raise CudaError("invalid device context")

        class Context:
            def push(self) -> None:
                cuda.contexts.append(self)

            @staticmethod
            def pop() -> None:
                cuda.contexts.pop()

        class Device:
            def __init__(self, number: int) -> None:
                self.number = number

            def name(self) -> str:
                return "Tesla V100-SXM2-16GB"

            def compute_capability(self) -> tuple[int, int]:
                return capability

            def retain_primary_context(self) -> Context:
                return Context()

        class DeviceAllocation:
            def __init__(self, nbytes: int) -> None:
                need_context()
                self.address = next(address)
                cuda.allocated[self.address] = bytearray(nbytes)

            def __int__(self) -> int:
                return self.address

            def __del__(self) -> None:
                cuda.allocated.pop(self.address, None)

        class Stream:
            def __init__(self) -> None:
                need_context()
                self.handle = next(address)
                cuda.streams[self.handle] = []

            def synchronize(self) -> None:
                while cuda.streams[self.handle]:
                    cuda.streams[self.handle].pop(0)()

        self.Device, self.Stream, self.mem_alloc = Device, Stream, DeviceAllocation

    def init(self) -> None:
        """The driver is there."""

    def pagelocked_empty(self, shape: Shape, dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def memcpy_htod_async(self, dest: Any, src: Any, stream: Any) -> None:
        def copy() -> None:
            self.allocated[int(dest)][: src.nbytes] = np.ascontiguousarray(src).tobytes()

        self.streams[stream.handle].append(copy)

    def memcpy_dtoh_async(self, dest: Any, src: Any, stream: Any) -> None:
        def copy() -> None:
            dest[...] = np.frombuffer(self.allocated[int(src)], dest.dtype, dest.size).reshape(dest.shape)

        self.streams[stream.handle].append(copy)


class ILogger:
    class Severity(enum.Enum):
        ERROR = 1
        INFO = 3

    def __init__(self) -> None:
        pass

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine = engine
        self._profile = 0
        self._shape: Shape | None = None
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < len(self._engine.shapes):
            raise RuntimeError("Error in set optimization profile async.")
        self._profile = profile_index
        self._shape = None
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        least, _, most = self._engine.shapes[self._profile]
        if name != "image" or not all(low <= side <= high for low, side, high in zip(least, shape, most)):
            return False
        self._shape = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in ("image", "probability"):
            return False
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        shape, cuda = self._shape, self._engine.cuda
        if shape is None or len(self._addresses) != 2:
            return False

        def run() -> None:
            image = np.frombuffer(cuda.allocated[self._addresses["image"]], np.uint8, int(np.prod(shape)))
            content = np.ascontiguousarray(self._engine.infer(image.reshape(shape))).tobytes()
            cuda.allocated[self._addresses["probability"]][: len(content)] = content

        cuda.streams[stream_handle].append(run)
        return True


class EngineInspector:
    def get_engine_information(self, format: Any) -> str:  # noqa: A002
        return '{"Layers": []}'


class ICudaEngine:
    device_memory_size_v2 = 1 << 20
    num_io_tensors = 2

    def __init__(self, shapes: list[Any], model: bytes, cuda: Cuda) -> None:
        self.shapes, self.cuda = shapes, cuda
        self._folder = tempfile.TemporaryDirectory()
        path = Path(self._folder.name) / "model.onnx"
        path.write_bytes(model)
        self._network = CpuEngine(path, EngineChoice("onnxruntime", "f32"))

    def infer(self, image: Any) -> Any:
        return Faults.current.answer(self._network.infer(image))

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.shapes)

    def get_tensor_name(self, index: int) -> str:
        return ("image", "probability")[index]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Shape]:
        return [tuple(shape) for shape in self.shapes[profile_index]]

    def create_execution_context(self) -> IExecutionContext | None:
        return None if Faults.current.no_context else IExecutionContext(self)

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector()


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytes:
        return self._content or b"a new timing cache"


class IOptimizationProfile:
    def __init__(self) -> None:
        self.shapes: tuple[Shape, ...] = ()

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:  # noqa: A002
        self.shapes = (min, opt, max)


class IBuilderConfig:
    def __init__(self) -> None:
        self.profiles: list[IOptimizationProfile] = []
        self.builder_optimization_level = 3
        self.profiling_verbosity: Any = None
        self._cache: ITimingCache | None = None

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        assert pool_size > 0

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        least, usual, most = profile.shapes
        if not all(low <= mid <= high for low, mid, high in zip(least, usual, most)):
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache | None:
        return None if Faults.current.no_timing_cache else ITimingCache(serialized_timing_cache)

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        assert cache is not None
        self._cache = cache
        return True

    def get_timing_cache(self) -> ITimingCache | None:
        return self._cache


class INetworkDefinition:
    num_inputs = 1

    def __init__(self) -> None:
        self.model = b""

    def get_input(self, index: int) -> Any:
        return types.SimpleNamespace(name="image")


class Builder:
    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << NetworkDefinitionCreationFlag.STRONGLY_TYPED
        return INetworkDefinition()

    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile()

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        if Faults.current.no_plan:
            self._logger.log(ILogger.Severity.ERROR, "could not find any implementation")
            return None
        shapes = json.dumps([profile.shapes for profile in config.profiles]).encode()
        return HEADER + shapes + b"\n" + network.model


class OnnxParser:
    num_errors = 0

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network

    def parse(self, model: bytes) -> bool:
        self._network.model = model
        return True

    def get_error(self, index: int) -> Any:
        raise IndexError(index)


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class Tensorrt(types.ModuleType):
    """The module `tensorrt`, for one "GPU"."""

    ILogger, Builder, OnnxParser = ILogger, Builder, OnnxParser
    NetworkDefinitionCreationFlag = NetworkDefinitionCreationFlag
    MemoryPoolType = enum.Enum("MemoryPoolType", "WORKSPACE")
    ProfilingVerbosity = enum.Enum("ProfilingVerbosity", "DETAILED")
    LayerInformationFormat = enum.Enum("LayerInformationFormat", "JSON")

    def __init__(self, cuda: Cuda, version: str = "10.4.0") -> None:
        super().__init__("tensorrt")
        self.__version__ = version

        class Runtime:
            def __init__(self, logger: ILogger) -> None:
                self._logger = logger

            def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
                if not serialized_engine.startswith(HEADER):
                    self._logger.log(ILogger.Severity.ERROR, "Serialization assertion magicTagRead failed")
                    return None
                shapes, model = serialized_engine[len(HEADER) :].split(b"\n", 1)
                return ICudaEngine(json.loads(shapes), model, cuda)

        self.Runtime = Runtime
