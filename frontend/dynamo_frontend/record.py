"""What is counted of a request, and the one log line that says how it ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry import trace

from dynamo_frontend.metrics import Gaps, Metrics, Series
from dynamo_grpc import MeshError, OverloadedError, RequestCancelledError, SlowReaderError, semconv, telemetry
from dynamo_grpc.v1 import inference_pb2

if TYPE_CHECKING:
    from dynamo_frontend.preprocess import Part

logger = logging.getLogger("dynamo_frontend.requests")

#: What errors are called in metrics; others by their reason.
_ERROR_TYPES = {
    "INVALID_REQUEST": "validation",
    "CONTEXT_LENGTH_EXCEEDED": "validation",
    "TOO_LARGE": "validation",
    "MODEL_NOT_FOUND": "not_found",
    "UNSUPPORTED": "not_implemented",
    "OVERLOADED": "overload",
    "NO_INSTANCES": "unavailable",
    "DRAINING": "unavailable",
    "REGISTRY": "unavailable",
}


def shown_name(name: str) -> str:
    """A model's name as a client gave it, fit for one line of a log."""
    return "".join(char if char.isprintable() else "?" for char in name[:100])


@dataclass(slots=True, eq=False)
class Record:
    """One request. `end` is called once, however it ended.

    Attributes:
        cached_tokens: of the prompt, if its worker said so.
        span: the request's, in a trace; invalid without one.
        on_end: told when it has ended.
        num_choices: that it is answered with, of all its prompts.
        num_tokens: that have arrived so far.
        last: when the last output arrived, as `started`; 0 before the first.
    """

    metrics: Metrics
    request_id: str
    endpoint: str
    model: str = ""
    namespace: str = ""
    is_stream: bool = False
    instance: int = 0
    num_retries: int = 0
    num_migrations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    finish: str = ""
    error: MeshError | None = None
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    span: trace.Span = trace.INVALID_SPAN
    trace_id: str = ""
    _series: Series | None = None
    on_end: Callable[[Record], None] | None = None
    num_choices: int = 1
    num_tokens: int = 0
    last: float = 0.0
    _prepared: float = 0.0
    _routed: float = 0.0
    _gaps: Gaps = field(default_factory=Gaps)

    def begin(self, namespace: str, model: str) -> None:
        """The model is known: from here on its name may be a label (names that clients make up may not)."""
        self.namespace, self.model = namespace, model
        self._series = series = self.metrics.of(namespace, model, self.endpoint)
        series.started.inc()
        series.inflight.inc()
        series.queued.inc()

    @property
    def where(self) -> str | None:
        """The worker that was asked last, as /health shows it; None before there was one."""
        return f"{self.instance:016x}" if self.instance else None

    @property
    def phase(self) -> str:
        """What it is doing."""
        if self.first is not None:
            return "streaming"
        return "waiting for its first output" if self._routed else "routing" if self._prepared else "preparing"

    def prompt_is_ready(self, parts: Sequence[Part]) -> None:
        """Its prompt is ready to be sent, in these parts."""
        self.prepared()
        self.prompt_tokens = sum(len(part.message.token_ids) for part in parts if part.counts_prompt)
        self.num_choices = sum(part.num_choices for part in parts)

    def count(self, usage: inference_pb2.Usage) -> None:
        """Take the counts of its answer."""
        self.prompt_tokens, self.output_tokens = usage.prompt_tokens, usage.completion_tokens
        self.cached_tokens = usage.cached_tokens if usage.HasField("cached_tokens") else None

    def prepared(self) -> None:
        """Its prompt is ready to be sent."""
        self._prepared = time.perf_counter()

    def routed(self, instance_id: int) -> None:
        """A call to a worker is open."""
        self._routed, self.instance = self._routed or time.perf_counter(), instance_id

    def output(self, instance_id: int, num_tokens: int) -> None:
        """Tokens arrived, together."""
        now = time.perf_counter()
        if self.first is None:
            self.first = now
            if self._series is not None:
                self._series.queued.dec()
            self.span.add_event(semconv.FIRST_OUTPUT)
        elif num_tokens:
            self._gaps.add(now - self.last, num_tokens, self.num_choices)
        self.last, self.instance = now, instance_id
        self.num_tokens += num_tokens

    def begin_again(self) -> None:
        """Its answer was lost in the middle, and is made again from its beginning: what came of it is for nobody."""
        self.num_migrations += 1
        self.num_tokens, self._gaps = 0, Gaps()

    def fail(self, error: MeshError) -> None:
        """The request ended with an error; the first one counts."""
        self.error = self.error or error

    def end(self) -> None:
        """Count, and write the line."""
        now = time.perf_counter()
        error, series = self.error, self._series
        error_type = _ERROR_TYPES.get(error.reason, error.reason.lower()) if error else ""
        who = self.metrics.labels(self.namespace, self.model) if series else (self.namespace, "")
        labels = (*who, self.endpoint)
        kind = "stream" if self.is_stream else "unary"
        self.metrics.requests.labels(*labels, kind, "error" if error else "success", error_type).inc()
        if isinstance(error, OverloadedError):
            self.metrics.rejections.labels(*labels).inc()
        elif isinstance(error, (RequestCancelledError, SlowReaderError)):
            self.metrics.cancellations.labels(*labels).inc()
        if series is not None:
            self._count(series, now)
        self._describe()
        if self.on_end is not None:
            self.on_end(self)
        self._log(now, error_type)

    def _describe(self) -> None:
        """Say on the span what became of the request."""
        span, self.trace_id = self.span, telemetry.trace_id()
        if not span.is_recording():
            return
        span.set_attributes(
            {
                semconv.HTTP_STATUS: self.error.http_status if self.error else 200,
                semconv.INPUT_TOKENS: self.prompt_tokens,
                semconv.OUTPUT_TOKENS: self.output_tokens,
                semconv.NUM_MIGRATIONS: self.num_migrations,
            }
        )
        if self.instance:
            span.set_attribute(semconv.INSTANCE_ID, f"{self.instance:016x}")
        if self.finish:
            span.set_attribute(semconv.FINISH_REASONS, [self.finish])
        if self.cached_tokens is not None:
            span.set_attribute(semconv.CACHED_TOKENS, self.cached_tokens)
        if self.first is not None:
            span.set_attribute(semconv.FIRST_CHUNK_S, self.first - self.started)
        if self.error is not None:
            telemetry.failed(span, self.error)

    def _count(self, series: Series, now: float) -> None:
        series.inflight.dec()
        series.duration.observe(now - self.started)
        if self._prepared:
            series.preprocess.observe(self._prepared - self.started)
            series.prompt_length.observe(self.prompt_tokens)
            series.prompt_tokens.inc(self.prompt_tokens)
        if self._routed:
            series.route.observe(self._routed - self._prepared)
        for kind, count in (("new_request", self.num_retries), ("ongoing_request", self.num_migrations)):
            if count:
                self.metrics.migrations.labels(*self.metrics.labels(self.namespace, self.model), kind).inc(count)
        if self.first is None:
            series.queued.dec()
            return
        series.first_output.observe(self.first - self._routed)
        series.ttft.observe(self.first - self.started)
        series.add_gaps(self._gaps)
        series.output_length.observe(self.output_tokens)
        series.output_tokens.inc(self.output_tokens)
        if self.cached_tokens is not None:
            series.cached.observe(self.cached_tokens)

    def _log(self, now: float, error_type: str) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        status = self.error.http_status if self.error else 200
        ttft_ms = None if self.first is None else round((self.first - self.started) * 1e3, 1)
        total_ms = round((now - self.started) * 1e3, 1)
        instance = f"{self.instance:016x}" if self.instance else ""
        how = f"finish={self.finish or '-'}"
        if self.error is not None:
            how = f"error={error_type} ({self.error.message[:200]})"
        more = f" migrations={self.num_migrations}" if self.num_migrations else ""
        more += f" trace={self.trace_id}" if self.trace_id else ""
        logger.info(
            "%s %s model=%s status=%s %s tokens=%d+%d ttft_ms=%s total_ms=%s instance=%s%s",
            self.request_id,
            self.endpoint,
            self.model or "-",
            status,
            how,
            self.prompt_tokens,
            self.output_tokens,
            "-" if ttft_ms is None else ttft_ms,
            total_ms,
            instance or "-",
            more,
            extra={
                "event": "request ended",
                "request_id": self.request_id,
                "endpoint": self.endpoint,
                "namespace": self.namespace,
                "model": self.model,
                "status": status,
                "error_type": error_type,
                "error": self.error.message[:1000] if self.error else "",
                "finish": self.finish,
                "is_stream": self.is_stream,
                "prompt_tokens": self.prompt_tokens,
                "output_tokens": self.output_tokens,
                "cached_tokens": self.cached_tokens,
                "ttft_ms": ttft_ms,
                "total_ms": total_ms,
                "instance": instance,
                "num_retries": self.num_retries,
                "num_migrations": self.num_migrations,
            },
        )
