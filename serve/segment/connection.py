"""A gRPC connection to one served model, whose faults are sentences."""

from __future__ import annotations

import re
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unet.errors import UnetError
from unet.geometry import is_valid_size
from unet.names import INPUT, OUTPUT

# Their numbers in Triton's protocol, inference.DataType.
_UINT8, _FP16 = 2, 10
_PORTS = [(INPUT, _UINT8, [1, -1, -1]), (OUTPUT, _FP16, [1, -1, -1])]
# gRPC hands a channel's waiting time between attempts on to the next channel to the same address, unless told not to.
_CHANNEL = [
    ("grpc.max_send_message_length", 2**31 - 1),
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.use_local_subchannel_pool", 1),
]


class ClientError(UnetError):
    """A server, a model or an answer that cannot be used."""


class ServerGoneError(ClientError):
    """No server answers at the address."""


class NotServedError(ClientError):
    """The server has no such model, or has it no longer."""


class ServerBusyError(ClientError):
    """The server's queue is full."""


class DeadlineError(ClientError):
    """No answer came in time."""


class MemoryForgottenError(ClientError):
    """The server does not know this client's shared memory any longer."""


class TlsError(ClientError):
    """Certificates that cannot be read, or that client and server do not accept of each other."""


@dataclass(frozen=True)
class Tls:
    """What an encrypted connection needs, as PEM files.

    Attributes:
        ca: the authority whose certificate the server must show.
        cert: this client's certificate, where the server asks for one.
        key: its private key.
    """

    ca: str | Path
    cert: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise TlsError("a client's certificate and its key go together: give both --tls_cert and --tls_key")
        self._check_files()

    def _check_files(self) -> None:
        """Read them as gRPC will, which does not say which of them is at fault."""
        for path in (self.ca, self.cert, self.key):
            if path is None:
                continue
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise TlsError(f"{path} cannot be read: {error.strerror}") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            context.load_verify_locations(self.ca)
        except ssl.SSLError as error:
            raise TlsError(f"{self.ca} holds no certificate of an authority in PEM ({_openssl_says(error)})") from error
        if self.cert is None or self.key is None:
            return
        try:
            # Without a password it would ask for one.
            context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError as error:
            raise TlsError(
                f"{self.cert} and {self.key} are no certificate and its unencrypted key in PEM ({_openssl_says(error)})"
            ) from error

    def options(self) -> dict[str, Any]:
        """For tritonclient's gRPC client.

        Raises:
            TlsError: if a file cannot be read here, as on a Dask worker, which gets this object unchecked.
        """
        self._check_files()
        names = {"root_certificates": self.ca, "certificate_chain": self.cert, "private_key": self.key}
        return {"ssl": True, **{name: str(path) for name, path in names.items() if path is not None}}


def _openssl_says(error: ssl.SSLError) -> str:
    return (error.reason or error.args[-1]).lower().replace("_", " ")


@dataclass(frozen=True)
class Interface:
    """What a served model takes, and which one it is.

    Attributes:
        tile_sizes: sides of a tile, in pixels, 188 + 16k each.
        max_batch_size: most tiles in one request.
        version: of the model that answers.
        card_sha256: of the card of its artefacts; empty if its publisher did not say.
        pixel_size_nm: side of a pixel of the slices that it was trained on; None if not known.
    """

    tile_sizes: tuple[int, ...]
    max_batch_size: int
    version: str
    card_sha256: str
    pixel_size_nm: float | None = None


class Connection:
    """A connection to one model on one server.

    Attributes:
        timeout_s: longest wait for one answer.
        client: tritonclient's own, for the calls that this class does not wrap.
        grpc: tritonclient's gRPC module, which takes a while to load.
    """

    def __init__(self, url: str, model_name: str, model_version: str, timeout_s: float, tls: Tls | None = None) -> None:
        """Prepare to connect, which happens with the first call; encrypted if ``tls`` is given.

        Raises:
            ClientError: if the address is malformed, or a file of ``tls`` cannot be read.
        """
        import tritonclient.grpc as grpc

        self.url, self.model_name, self.model_version, self.timeout_s = url, model_name, model_version, timeout_s
        self.grpc: Any = grpc
        encryption = tls.options() if tls else {}
        try:
            self.client: Any = grpc.InferenceServerClient(url, channel_args=_CHANNEL, **encryption)
        except Exception as error:  # a malformed address fails in several ways
            raise ClientError(f"{url} is not HOST:PORT of a gRPC server: {error}") from error

    def interface(self, timeout_s: float) -> Interface:
        """Ask what the model takes.

        Args:
            timeout_s: longest wait for the answer.

        Raises:
            ClientError: if no server answers, it does not serve the model, or the model is of another kind.
        """
        try:
            answer = self.client.get_model_config(self.model_name, self.model_version, client_timeout=timeout_s)
            about = self.client.get_model_metadata(self.model_name, self.model_version, client_timeout=timeout_s)
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
        version = self.model_version or max(about.versions, key=int)
        card = config.parameters["card_sha256"].string_value
        size = config.parameters["pixel_size_nm"].string_value
        return Interface(sizes, max(1, int(config.max_batch_size)), version, card, float(size) if size else None)

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
            return DeadlineError(
                f"{self.url} gave no answer in {self.timeout_s:g} s: see its log, or raise --timeout_s"
            )
        if "UNAVAILABLE" in status and "queue" in message:
            return ServerBusyError(
                f"{self.url} has too many requests waiting ({message}): try again when it is less busy"
            )
        if "UNAVAILABLE" in status and ("handshake" in message.lower() or "SSL" in message):
            return TlsError(
                f"{self.url} and this client do not accept each other's certificates ({_reason(message)}): name the "
                "authority of the server's with --tls_ca, and if it asks for one give --tls_cert and --tls_key"
            )
        if "UNAVAILABLE" in status:
            return ServerGoneError(
                f"no server answers at {self.url}: start one with `make serve`, or name it with --url; one that is "
                "encrypted, or wants a certificate, needs --tls_ca, --tls_cert and --tls_key"
            )
        if "unknown model" in message.lower():
            version = f" version {self.model_version}" if self.model_version else ""
            return NotServedError(
                f"{self.url} does not serve {self.model_name}{version}: publish it, or name another --model_name"
            )
        if "shared memory region" in message:
            return MemoryForgottenError(
                f"{self.url} has forgotten this client's shared memory, as when perf_analyzer or a restart came "
                "between: run it again, or leave shared memory off"
            )
        return ClientError(f"{self.url} refused: {message.splitlines()[0]}")

    def close(self) -> None:
        """Hang up."""
        self.client.close()


def _reason(message: str) -> str:
    """The telling words of OpenSSL's message, as in "CERTIFICATE_VERIFY_FAILED"."""
    found = re.findall(r"[A-Z]+(?:_[A-Z]+){2,}", message)
    return found[-1] if found else message.splitlines()[0]
