"""Trace context over gRPC metadata, by the OpenTelemetry API alone: without an SDK it costs next to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace

from dynamo_grpc import semconv
from dynamo_grpc.errors import MeshError, RequestCancelledError

logger = logging.getLogger(__name__)

_tracer = trace.get_tracer("dynamo_grpc")


def configure_tracing(service: str) -> None:
    """Export spans, if the standard OTEL_* variables ask for it; called at a process's start.

    Args:
        service: the service's name, unless OTEL_SERVICE_NAME says otherwise.
    """
    if is_recording():
        return  # somebody has configured it already
    asked = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    asked = asked or ("otlp" if any(os.environ.get(name) for name in endpoints) else "none")
    asked = next((one for one in ("otlp", "console", "none") if one in asked.replace(" ", "").split(",")), asked)
    if asked == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        exporter: SpanExporter
        if asked == "console":
            exporter = ConsoleSpanExporter()
        elif asked != "otlp":
            logger.warning("OTEL_TRACES_EXPORTER=%s is not known here: there are otlp, console and none", asked)
            return
        elif _protocol().startswith("http"):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # type: ignore[import-not-found,unused-ignore]
                OTLPSpanExporter as HttpExporter,
            )

            exporter = HttpExporter()
        else:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ModuleNotFoundError as error:
        package = "opentelemetry-exporter-otlp-proto-http" if ".http" in str(error.name) else "'dynamo-grpc[otel]'"
        logger.warning("OTEL_* asks for traces, and %s is missing: pip install %s", error.name, package)
        return
    except Exception as error:  # a value that it can't use: requests are served without traces
        logger.warning("OTEL_* asks for traces that can't be made: %s: %s", type(error).__name__, error)
        return
    has_name = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if has_name else {SERVICE_NAME: service}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def _protocol() -> str:
    name = "OTEL_EXPORTER_OTLP_PROTOCOL"
    return os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(name) or "grpc"


def inject() -> dict[str, str]:
    """Headers that carry the current trace context."""
    carrier: dict[str, str] = {}
    if otel_context.get_current():  # nothing was traced, nothing came in: asking all propagators costs more than a look
        propagate.inject(carrier)
    return carrier


def is_recording() -> bool:
    """Whether anybody may record spans; while not, nothing of them is done."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


def _is_left_out(context: otel_context.Context) -> bool:
    """Whether a trace is one that isn't recorded: then no span of it is made, which costs more than to look."""
    span = trace.get_current_span(context).get_span_context()
    return span.is_valid and not span.trace_flags.sampled and _follows_parents(trace.get_tracer_provider())


@functools.lru_cache(maxsize=1)
def _follows_parents(provider: trace.TracerProvider) -> bool:
    """Whether its sampler does as the span above says; without one, nobody decides otherwise."""
    sampler = getattr(provider, "sampler", None)
    return sampler is None or sampler.get_description().startswith("ParentBased")


def trace_id() -> str:
    """The current trace's id in hexadecimal; empty when there is none."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


@contextlib.contextmanager
def server_span(
    name: str, carrier: Mapping[str, str], attributes: Mapping[str, Any], *, says_failure: bool = True
) -> Iterator[trace.Span]:
    """A span for a request that came in, child of the context in `carrier`; the current one inside the block.

    Args:
        says_failure: what is raised inside says how it failed; else whoever is inside does.
    """
    is_recorded = is_recording()
    if not is_recorded and not any(field in carrier for field in propagate.get_global_textmap().fields):
        yield trace.INVALID_SPAN  # nobody records it, and it has nothing to hand on
        return
    parent = propagate.extract(carrier)
    if _is_left_out(parent):
        token = otel_context.attach(parent)
        try:
            yield trace.get_current_span(parent)
        finally:
            otel_context.detach(token)
        return
    span = _tracer.start_span(name, parent, trace.SpanKind.SERVER, dict(attributes))
    token = otel_context.attach(trace.set_span_in_context(span, parent))
    try:
        yield span
    except BaseException as error:
        if says_failure:
            failed(span, error)
        raise
    finally:
        span.end()
        otel_context.detach(token)


def failed(span: trace.Span, error: BaseException) -> None:
    """Say on a span how it failed: what its client did is no error of the span."""
    if not span.is_recording():
        return
    if isinstance(error, (asyncio.CancelledError, RequestCancelledError)):
        span.add_event(semconv.CANCELLED)
        span.set_attribute(semconv.ERROR_TYPE, "cancelled")
        return
    told = error if isinstance(error, MeshError) else None
    span.set_attribute(semconv.ERROR_TYPE, told.reason.lower() if told else type(error).__qualname__)
    if told is None or told.http_status >= 500:
        span.set_status(trace.Status(trace.StatusCode.ERROR, told.message if told else None))


class Attempts:
    """The spans of one request's attempts: each is a call to one instance, child of what was current at the request.

    Args:
        method: the RPC, as package.Service/Method.
    """

    __slots__ = ("_method", "_num", "_parent", "_span")

    def __init__(self, method: str) -> None:
        self._method, self._num = method, 0
        self._parent = otel_context.get_current()
        self._span: trace.Span | None = None

    @classmethod
    def begin(cls, method: str) -> Attempts | None:
        """Spans of attempts, if anybody may record them."""
        return cls(method) if is_recording() and not _is_left_out(otel_context.get_current()) else None

    @contextlib.contextmanager
    def open(self, address: str, instance_id: str) -> Iterator[None]:
        """A new attempt; a call that is made inside the block carries it to the worker."""
        self._num += 1
        host, _, port = address.rpartition(":")
        attributes: dict[str, str | int] = {
            semconv.RPC_SYSTEM: "grpc",
            semconv.RPC_METHOD: self._method,
            semconv.SERVER_ADDRESS: host,
            semconv.SERVER_PORT: int(port) if port.isdigit() else 0,
            semconv.INSTANCE_ID: instance_id,
            semconv.ATTEMPT: self._num,
        }
        self._span = _tracer.start_span(self._method, self._parent, trace.SpanKind.CLIENT, attributes)
        token = otel_context.attach(trace.set_span_in_context(self._span, self._parent))
        try:
            yield
        finally:
            otel_context.detach(token)

    def event(self, name: str) -> None:
        """Something happened in the attempt."""
        if self._span is not None:
            self._span.add_event(name)

    def parent_event(self, name: str, text: str) -> None:
        """Something happened to the request as a whole."""
        trace.get_current_span(self._parent).add_event(name, {"reason": text})

    def end(self, error: BaseException | None = None) -> None:
        """The attempt has ended. Idempotent."""
        span, self._span = self._span, None
        if span is not None:
            if error is not None:
                failed(span, error)
            span.end()


def flush(limit_s: float = 2.0) -> None:
    """Send what is recorded; blocks. A process that is about to end calls it."""
    provider = trace.get_tracer_provider()
    if (force_flush := getattr(provider, "force_flush", None)) is not None:
        force_flush(int(limit_s * 1000))


def headers(metadata: Sequence[tuple[str, str | bytes]]) -> dict[str, str]:
    """GRPC metadata as a dict of its text entries."""
    return {key: value for key, value in metadata if isinstance(value, str)}
