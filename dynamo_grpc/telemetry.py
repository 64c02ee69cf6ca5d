"""Trace context over gRPC metadata, by the OpenTelemetry API alone: without an SDK it costs next to nothing."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace

logger = logging.getLogger(__name__)

_tracer = trace.get_tracer("dynamo_grpc")


def configure_tracing(service: str) -> None:
    """Export spans, if the standard OTEL_* variables ask for it; called once, at a process's start.

    Args:
        service: the service's name, unless OTEL_SERVICE_NAME says otherwise.
    """
    asked = os.environ.get("OTEL_TRACES_EXPORTER", "")
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    asked = asked or ("otlp" if any(os.environ.get(name) for name in endpoints) else "none")
    if asked == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

        exporter: SpanExporter
        if asked == "console":
            exporter = ConsoleSpanExporter()
        else:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            exporter = OTLPSpanExporter()
    except ModuleNotFoundError as error:
        logger.warning("OTEL_* asks for traces, and %s is missing: pip install 'dynamo-grpc[otel]'", error.name)
        return
    name = os.environ.get("OTEL_SERVICE_NAME", service)
    provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)


def inject() -> dict[str, str]:
    """Headers that carry the current trace context."""
    carrier: dict[str, str] = {}
    if otel_context.get_current():  # nothing was traced, nothing came in: asking all propagators costs more than a look
        propagate.inject(carrier)
    return carrier


@contextlib.contextmanager
def server_span(name: str, carrier: Mapping[str, str], attributes: Mapping[str, Any]) -> Iterator[trace.Span]:
    """A span for a request that came in, child of the context in `carrier`; the current one inside the block."""
    is_recorded = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
    if not is_recorded and not any(field in carrier for field in propagate.get_global_textmap().fields):
        yield trace.INVALID_SPAN  # nobody records it, and it has nothing to hand on
        return
    parent = propagate.extract(carrier)
    token = otel_context.attach(parent)
    try:
        with _tracer.start_as_current_span(name, kind=trace.SpanKind.SERVER, attributes=dict(attributes)) as span:
            yield span
    finally:
        otel_context.detach(token)


def headers(metadata: Sequence[tuple[str, str | bytes]]) -> dict[str, str]:
    """GRPC metadata as a dict of its text entries."""
    return {key: value for key, value in metadata if isinstance(value, str)}
