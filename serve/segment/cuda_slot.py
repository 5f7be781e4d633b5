"""Room for a request in the memory of a GPU that server and client share."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from serve.segment.errors import ClientError
from serve.segment.slot import Shape, Slot, forget, region_stem
from unet.geometry import output_size
from unet.names import INPUT, OUTPUT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from serve.segment.connection import Connection

_DEVICE = 0


class CudaMemoryError(ClientError):
    """Memory of a GPU that cannot be had or used."""


class CudaSlot(Slot):
    """Room for one request in the memory of the first visible GPU, which server and client share.

    Tiles go to the GPU from here, and the answer is fetched from there: the server copies nothing.
    """

    memory = "cuda"

    def __init__(self, connection: Connection, shape: Shape) -> None:
        """Make the room and have the server map it.

        Raises:
            CudaMemoryError: there is no GPU, too little of its memory, or no cuda-python.
            tritonclient.utils.InferenceServerException: if the server does not take it.
        """
        super().__init__(connection, shape)
        self._cuda = _cuda_shared_memory()
        side = output_size(shape[-1])
        self._answer_shape = (shape[0], 1, side, side)
        stem = region_stem()
        self._names = {INPUT: f"{stem}-cuda-in", OUTPUT: f"{stem}-cuda-out"}
        self._regions: dict[str, Any] = {}
        try:
            self._register(INPUT, self.images.nbytes)
            self._register(OUTPUT, int(np.prod(self._answer_shape)) * 2)
        except BaseException:
            self.close()
            raise

    def _register(self, way: str, size: int) -> None:
        with self._errors():
            self._regions[way] = self._cuda.create_shared_memory_region(self._names[way], size, _DEVICE)
            handle = self._cuda.get_raw_handle(self._regions[way])
        self.connection.client.register_cuda_shared_memory(
            self._names[way], handle, _DEVICE, size, client_timeout=self.connection.timeout_s
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._cuda.CudaSharedMemoryException as error:
            raise CudaMemoryError(f"the GPU's memory cannot be used: {error}") from error

    def tensors(self, grpc: Any, count: int) -> tuple[list[Any], list[Any]]:
        """The request's inputs and outputs: names of regions, the tiles already on the GPU.

        Raises:
            CudaMemoryError: they cannot be brought there.
        """
        with self._errors():
            self._cuda.set_shared_memory_region(self._regions[INPUT], [self.images[:count]])
        image = grpc.InferInput(INPUT, [count, *self.shape[1:]], "UINT8")
        image.set_shared_memory(self._names[INPUT], self.images[:count].nbytes)
        answer = grpc.InferRequestedOutput(OUTPUT)
        answer.set_shared_memory(self._names[OUTPUT], count * int(np.prod(self._answer_shape[1:])) * 2)
        return [image], [answer]

    def outputs(self, answer: Any, count: int) -> npt.NDArray[np.float16]:
        """The probabilities that the server left on the GPU, fetched from there.

        Raises:
            CudaMemoryError: they cannot be.
        """
        with self._errors():
            whole = self._cuda.get_contents_as_numpy(self._regions[OUTPUT], np.float16, list(self._answer_shape))
        return np.asarray(whole[:count], np.float16)

    def close(self) -> bool:
        """Have the server forget the regions, and give them back."""
        names = [self._names[way] for way in self._regions]
        client = self.connection.client
        _, answers = forget(names, client.unregister_cuda_shared_memory, wait=not self.spent)
        for region in self._regions.values():
            with contextlib.suppress(self._cuda.CudaSharedMemoryException):
                self._cuda.destroy_shared_memory_region(region)
        self._regions = {}
        return answers


def _cuda_shared_memory() -> Any:
    try:
        import tritonclient.utils.cuda_shared_memory as cuda
    except (ImportError, RuntimeError) as error:  # it makes the one of cuda-python into the other
        raise CudaMemoryError(
            f"cuda-python cannot be loaded ({error.__context__ or error}): on a machine with an NVIDIA GPU, "
            "pip install 'unet-medical-triton[gpu]'"
        ) from error
    return cuda
