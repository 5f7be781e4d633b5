"""Traces for OpenTelemetry: where the time of a run goes. Nothing happens unless one is asked for.

Spans are begun and ended by `span` and `begin`; the servers get the ``traceparent`` of a request, so that their own
spans come into the same trace (https://www.w3.org/TR/trace-context/).
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from unet import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FLUSH_MS = 10_000
_PATH = "/v1/traces"

# What makes spans, while a trace is recorded.
_tracer: Any = None


class Span:
    """A stretch of time in a trace; it ends once.

    Attributes:
        headers: what tells a server that a request belongs to it; empty where no trace is recorded.
    """

    def __init__(self, span: Any = None) -> None:
        self._span = span
        self.headers: dict[str, str] = {}
        if span is not None:
            from opentelemetry import trace
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            TraceContextTextMapPropagator().inject(self.headers, trace.set_span_in_context(span))

    def end(self, error: BaseException | None = None) -> None:
        """End it now, in whatever thread; with the error that it ended in."""
        if self._span is None:
            return
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, str(error)))
        self._span.end()


_NONE = Span()


def begin(name: str, **attributes: str | int | float) -> Span:
    """Begin a span within the one that this thread is in, which stays the current one."""
    return _NONE if _tracer is None else Span(_tracer.start_span(name, attributes=attributes))


@contextlib.contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """The block as a span; what is begun in it lies within it."""
    if _tracer is None:
        yield
        return
    with _tracer.start_as_current_span(name, attributes=attributes):
        yield


def traces_url(collector: str) -> str:
    """Where a collector takes traces: its own path where the address has one, else the protocol's.

    Raises:
        ValueError: it is no http address.
    """
    parts = urlsplit(collector)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"--otlp {collector} is no address of a collector: give one like http://localhost:4318")
    return collector if parts.path.strip("/") else collector.rstrip("/") + _PATH


def _exporter(url: str) -> Any:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    class Exporter(OTLPSpanExporter):
        """Counts what was not taken, and raises nothing."""

        lost = 0

        def export(self, spans: Any) -> Any:
            try:
                result = super().export(spans)
            except Exception:  # of the HTTP library, which OpenTelemetry would log with a traceback
                result = SpanExportResult.FAILURE
            self.lost += 0 if result is SpanExportResult.SUCCESS else len(spans)
            return result

    return Exporter(endpoint=url)


@contextlib.contextmanager
def recording(collector: str, service: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Send the spans of the block to a collector, by OTLP over HTTP. One that does not answer costs no result.

    Args:
        collector: its http address; empty records nothing.
        service: that the spans are of.
        warn: is told in the end that the collector did not take everything.

    Raises:
        ValueError: it is no address.
        ImportError: OpenTelemetry is not installed.
    """
    global _tracer
    if not collector:
        yield
        return
    url = traces_url(collector)
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    # What it says of a collector that does not answer is said below in one sentence.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    about = Resource.create({"service.name": service, "service.version": __version__})
    provider = TracerProvider(resource=about, shutdown_on_exit=False)
    exporter = _exporter(url)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer(service, __version__)
    try:
        yield
    finally:
        _tracer = None
        taken = provider.force_flush(_FLUSH_MS)
        if taken:
            provider.shutdown()  # type: ignore[no-untyped-call]
        if exporter.lost or not taken:
            warn(f"the collector at {url} did not take all of the trace: see whether it runs and takes OTLP over HTTP")
