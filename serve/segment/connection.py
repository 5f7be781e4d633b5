"""A gRPC connection to one served model, whose faults are sentences."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

from serve.segment.address import Address, Tls
from serve.segment.errors import Action, ClientError, Rule, ServerError, rule_for
from unet.geometry import is_valid_size
from unet.names import INPUT, OUTPUT
from unet.tracing import begin

# gRPC's own limit of a message.
MESSAGE_BYTES = 2**31 - 1
# Their numbers in Triton's protocol, inference.DataType.
_UINT8, _FP16 = 2, 10
_PORTS = [(INPUT, _UINT8, [1, -1, -1]), (OUTPUT, _FP16, [1, -1, -1])]
# gRPC hands a channel's waiting time between attempts on to the next channel to the same address, unless told not to.
_CHANNEL = [
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class Interface:
    """What a served model takes, and which one it is.

    Attributes:
        tile_sizes: sides of a tile, in pixels, 188 + 16k each.
        max_batch_size: most tiles in one request.
        version: of the model that answers.
        card_sha256: of the card of its artefacts; empty if its publisher did not say.
        pixel_size_nm: side of a pixel of the slices that it was trained on; None if not known.
        threshold: of the probability, that its training chose; None if it chose none.
    """

    tile_sizes: tuple[int, ...]
    max_batch_size: int
    version: str
    card_sha256: str
    pixel_size_nm: float | None = None
    threshold: float | None = None

    def is_model_of(self, other: Interface) -> bool:
        """Whether two servers, or one at two times, serve the same network under the same version."""
        mine, others = ((each.version, each.card_sha256, each.tile_sizes, each.threshold) for each in (self, other))
        return mine == others


class Connection:
    """A connection to one model on one server.

    Attributes:
        url: the server's address.
        model_version: that requests ask for; empty for the newest, until ``interface`` has found which one that is.
        timeout_s: longest wait for one answer.
        run_id: begins the id of each request; empty for requests without one.
        client: tritonclient's own, for the calls that this class does not wrap.
        grpc: tritonclient's gRPC module, which takes a while to load.
    """

    def __init__(self, url: str, model_name: str, model_version: str, timeout_s: float, tls: Tls | None = None) -> None:
        """Prepare to connect, which happens with the first call; encrypted if ``tls`` is given.

        Raises:
            ClientError: if the address is malformed, or a file of ``tls`` cannot be read.
        """
        import tritonclient.grpc as grpc

        self.address = Address.parse(url)
        self.url, self.model_name, self.model_version = str(self.address), model_name, model_version
        self.timeout_s = timeout_s
        self.run_id, self._requests = "", itertools.count()
        self.grpc: Any = grpc
        if self.address.encrypted and tls is None:
            raise ClientError(f"{url} asks for an encrypted connection: name the server's authority with --tls_ca")
        options = tls.options() if tls else {}
        channel = [*_CHANNEL, ("grpc.enable_http_proxy", 0)] if self.address.is_local else _CHANNEL
        self.client: Any = grpc.InferenceServerClient(self.url, channel_args=channel, **options)

    def interface(self, timeout_s: float) -> Interface:
        """Ask what the model takes; from now on requests ask for the version that was found.

        Args:
            timeout_s: longest wait for the answer.

        Raises:
            ClientError: if no server answers, it does not serve the model, or the model is of another kind.
        """
        try:
            # Which versions there are; the configuration below is one for all of them.
            about = self.client.get_model_metadata(self.model_name, "", client_timeout=timeout_s)
            answer = self.client.get_model_config(self.model_name, "", client_timeout=timeout_s)
        except self.grpc.InferenceServerException as error:
            raise self.explain(error) from error
        config, served = answer.config, sorted(about.versions, key=int)
        if [(p.name, p.data_type, list(p.dims)) for p in (*config.input, *config.output)] != _PORTS:
            raise ClientError(
                f"{self.model_name} on {self.url} is not a U-Net of this project: it must take UINT8 {INPUT!r} and "
                f"give FP16 {OUTPUT!r}, one plane of any size each; name another model with --model_name"
            )
        version = self.model_version or served[-1]
        if version not in served:
            raise ServerError(
                f"{self.url} does not serve {self.model_name} version {version}, but {', '.join(served)}: a former "
                "version comes back with `python serve/repository.py --rollback --model_name "
                f"{self.model_name} --version {version} --load`",
                Action.REOPEN,
            )

        def about_version(name: str) -> str:
            own = config.parameters[f"{name}_{version}"].string_value
            return str(own or (config.parameters[name].string_value if version == served[-1] else ""))

        listed = about_version("tile_sizes") or config.parameters["tile_sizes"].string_value
        sizes = tuple(int(size) for size in listed.split(",") if size.strip().isdecimal())
        if not sizes or not all(is_valid_size(size) for size in sizes):
            raise ClientError(
                f"{self.model_name} on {self.url} names no usable tile size ({listed!r}): publish it again"
            )
        self.model_version = version
        size, threshold = about_version("pixel_size_nm"), about_version("threshold")
        return Interface(
            sizes,
            max(1, int(config.max_batch_size)),
            version,
            about_version("card_sha256"),
            float(size) if size else None,
            float(threshold) if threshold else None,
        )

    def infer(self, inputs: list[Any], outputs: list[Any]) -> Any:
        """Send one request and wait for its answer.

        Raises:
            ServerError: if the server does not answer or refuses.
        """
        try:
            return self.client.infer(self.model_name, inputs, **self._call(outputs))
        except self.grpc.InferenceServerException as error:
            raise self.explain(error) from error

    def infer_async(self, inputs: list[Any], outputs: list[Any], receive: Any) -> Any:
        """Send one request; ``receive(result=, error=)`` is called from another thread. Gives the call, to cancel it.

        Raises:
            ServerError: if it could not be sent.
        """
        span = begin("request", server=self.url)

        def end_and_receive(result: Any, error: Exception | None) -> None:
            span.end(error)
            receive(result=result, error=error)

        try:
            call = self._call(outputs)
            return self.client.async_infer(self.model_name, inputs, end_and_receive, headers=span.headers, **call)
        except self.grpc.InferenceServerException as error:
            span.end(error)
            raise self.explain(error) from error

    def _call(self, outputs: list[Any]) -> dict[str, Any]:
        request_id = f"{self.run_id}-{next(self._requests)}" if self.run_id else ""
        known = {"model_version": self.model_version, "request_id": request_id}
        return {**known, "outputs": outputs, "client_timeout": self.timeout_s}

    def explain(self, error: BaseException) -> ServerError:
        """One sentence for what went wrong with a call, and what is to be done about it."""
        rule, message = _rule_and_message(error)
        version = f" version {self.model_version}" if self.model_version else ""
        sentence = rule.sentence.format(
            server=self.url,
            model=f"{self.model_name}{version}",
            timeout=f"{self.timeout_s:g}",
            reason=_reason(message),
            reach=self._why_unreachable(message) if "{reach}" in rule.sentence else "",
            said=re.sub(r"\[request id: [^]]*\] ", "", (message.splitlines() or ["no reason given"])[0]),
        )
        return ServerError(sentence, rule.action)

    def _why_unreachable(self, message: str) -> str:
        if self.address.proxy is not None:
            return (
                f"gRPC asks the proxy for it ({self.address.proxy}); add {self.address.host} to no_proxy if the server "
                "is reached without it"
            )
        if "socket closed" in message.lower() and self.address.answers_http():
            return "what listens there speaks HTTP; give the port of the server's gRPC, 8001 by default"
        return (
            "start one with `make serve`, or name it with --url; one that is encrypted, or wants a certificate, needs "
            "--tls_ca, --tls_cert and --tls_key"
        )

    def close(self) -> None:
        """Hang up."""
        self.client.close()


def action_for(error: BaseException) -> Action:
    """What is to be done about a call that went wrong."""
    return _rule_and_message(error)[0].action


def unanswered(error: BaseException) -> bool:
    """Whether a call went wrong because no server answered, in time or at all."""
    return _code(error) in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def _code(error: BaseException) -> str:
    return str(getattr(error, "status", lambda: "")() or "").rpartition(".")[2]


def _rule_and_message(error: BaseException) -> tuple[Rule, str]:
    code = _code(error)
    message = str(getattr(error, "message", lambda: "")() or error)
    return rule_for(code, message), message


def _reason(message: str) -> str:
    """The telling words of OpenSSL's message, as in "CERTIFICATE_VERIFY_FAILED"."""
    found = re.findall(r"[A-Z]+(?:_[A-Z]+){2,}", message)
    return found[-1] if found else (message.splitlines() or [""])[0]
