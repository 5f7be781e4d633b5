"""A gRPC connection to one served model, whose faults are sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unet.errors import UnetError
from unet.geometry import is_valid_size

INPUT, OUTPUT = "image", "probability"
# Their numbers in Triton's protocol, inference.DataType.
_UINT8, _FP16 = 2, 10
_PORTS = [(INPUT, _UINT8, [1, -1, -1]), (OUTPUT, _FP16, [1, -1, -1])]


class ClientError(UnetError):
    """A server, a model or an answer that cannot be used."""


@dataclass(frozen=True)
class Interface:
    """What a served model takes.

    Attributes:
        tile_sizes: sides of a tile, in pixels, 188 + 16k each.
        max_batch_size: most tiles in one request.
    """

    tile_sizes: tuple[int, ...]
    max_batch_size: int


class Connection:
    """A connection to one model on one server.

    Attributes:
        timeout_s: longest wait for one answer.
        client: tritonclient's own, for the calls that this class does not wrap.
        grpc: tritonclient's gRPC module, which takes a while to load.
    """

    def __init__(self, url: str, model_name: str, model_version: str, timeout_s: float) -> None:
        """Prepare to connect, which happens with the first call.

        Raises:
            ClientError: if the address is malformed.
        """
        import tritonclient.grpc as grpc

        self.url, self.model_name, self.model_version, self.timeout_s = url, model_name, model_version, timeout_s
        self.grpc: Any = grpc
        try:
            self.client: Any = grpc.InferenceServerClient(url)
        except Exception as error:  # a malformed address fails in several ways
            raise ClientError(f"{url} is not HOST:PORT of a gRPC server: {error}") from error

    def interface(self) -> Interface:
        """Ask what the model takes.

        Raises:
            ClientError: if no server answers, it does not serve the model, or the model is of another kind.
        """
        try:
            answer = self.client.get_model_config(self.model_name, self.model_version, client_timeout=self.timeout_s)
        except self.grpc.InferenceServerException as error:
            raise self.explain(error) from error
        config = answer.config
        if [(p.name, p.data_type, list(p.dims)) for p in (*config.input, *config.output)] != _PORTS:
            raise ClientError(
                f"{self.model_name} on {self.url} is not a U-Net of this project: it must take UINT8 {INPUT!r} and "
                f"give FP16 {OUTPUT!r}, one plane of any size each; name another model with --model_name"
            )
        listed = config.parameters["tile_sizes"].string_value
        sizes = tuple(int(size) for size in listed.split(",") if size.strip().isdecimal())
        if not sizes or not all(is_valid_size(size) for size in sizes):
            raise ClientError(
                f"{self.model_name} on {self.url} names no usable tile size ({listed!r}): publish it again"
            )
        return Interface(sizes, max(1, int(config.max_batch_size)))

    def infer(self, inputs: list[Any], outputs: list[Any]) -> Any:
        """Send one request and wait for its answer.

        Raises:
            ClientError: if the server does not answer or refuses.
        """
        try:
            return self.client.infer(
                self.model_name, inputs, self.model_version, outputs=outputs, client_timeout=self.timeout_s
            )
        except self.grpc.InferenceServerException as error:
            raise self.explain(error) from error

    def infer_async(self, inputs: list[Any], outputs: list[Any], receive: Any) -> Any:
        """Send one request; ``receive(result=, error=)`` is called from another thread. Gives the call, to cancel it.

        Raises:
            ClientError: if it could not be sent.
        """
        try:
            return self.client.async_infer(
                self.model_name, inputs, receive, self.model_version, outputs=outputs, client_timeout=self.timeout_s
            )
        except self.grpc.InferenceServerException as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> ClientError:
        """One sentence for what went wrong with a call."""
        status = str(getattr(error, "status", lambda: "")() or "")
        message = str(getattr(error, "message", lambda: "")() or error)
        if "DEADLINE_EXCEEDED" in status:
            return ClientError(f"{self.url} gave no answer in {self.timeout_s:g} s: see its log, or raise --timeout_s")
        if "UNAVAILABLE" in status and "queue" in message:
            return ClientError(f"{self.url} has too many requests waiting ({message}): try again when it is less busy")
        if "UNAVAILABLE" in status:
            return ClientError(f"no server answers at {self.url}: start one with `make serve`, or name it with --url")
        if "unknown model" in message.lower():
            version = f" version {self.model_version}" if self.model_version else ""
            return ClientError(
                f"{self.url} does not serve {self.model_name}{version}: publish it, or name another --model_name"
            )
        if "shared memory region" in message:
            return ClientError(
                f"{self.url} has forgotten this client's shared memory, as when perf_analyzer or a restart came "
                "between: run it again, or leave shared memory off"
            )
        return ClientError(f"{self.url} refused: {message.splitlines()[0]}")

    def close(self) -> None:
        """Hang up."""
        self.client.close()
