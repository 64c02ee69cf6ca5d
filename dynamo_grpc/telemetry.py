"""Trace context over gRPC metadata, by the OpenTelemetry API alone: without an SDK it costs next to nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opentelemetry import context as otel_context
from opentelemetry import propagate, trace

_tracer = trace.get_tracer("dynamo_grpc")


def inject() -> dict[str, str]:
    """Headers that carry the current trace context."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier


@contextlib.contextmanager
def server_span(name: str, carrier: Mapping[str, str], attributes: Mapping[str, Any]) -> Iterator[trace.Span]:
    """A span for a request that came in, child of the context in `carrier`; the current one inside the block."""
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
