"""What is counted of a request: metrics, and the one log line that says how it ended."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from dynamo_frontend.processes import METRICS_DIR
from dynamo_grpc import MeshError, OverloadedError

logger = logging.getLogger("dynamo_frontend.requests")

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The frontend's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("model", "endpoint")

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"dynamo_frontend_{name}", text, labels, buckets=_SECONDS, registry=self.registry)

        self.requests = Counter(
            "dynamo_frontend_requests",
            "Requests that have ended.",
            (*labels, "request_type", "status", "error_type"),
            registry=self.registry,
        )
        self.inflight = Gauge(
            "dynamo_frontend_inflight_requests",
            "Requests that run now.",
            labels,
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.registry_up = Gauge(
            "dynamo_frontend_registry_up",
            "1 while all works that is done with the registry, 0 while what was known goes on serving.",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self.migrations = Counter(
            "dynamo_frontend_model_migration",
            "Requests that were sent to another worker: before their first output (new_request) or after it.",
            ("model", "migration_type"),
            registry=self.registry,
        )
        self.rejections = Counter(
            "dynamo_frontend_model_rejection",
            "Requests that were refused because the model's workers, or the frontend, had no room.",
            labels,
            registry=self.registry,
        )
        self.duration = histogram("request_duration_seconds", "Seconds from a request's arrival to its end.")
        self.ttft = histogram("time_to_first_token_seconds", "Seconds from a request's arrival to its first output.")
        self.output_tokens = Counter(
            "dynamo_frontend_output_tokens", "Tokens generated.", labels, registry=self.registry
        )
        self.input_tokens = Counter(
            "dynamo_frontend_input_tokens", "Tokens of prompts.", labels, registry=self.registry
        )

    def text(self) -> bytes:
        """All of them in Prometheus' format; of all processes, if there are several."""
        if METRICS_DIR not in os.environ:
            return generate_latest(self.registry)
        shared = CollectorRegistry()
        multiprocess.MultiProcessCollector(shared)
        return generate_latest(shared)


@dataclass(slots=True)
class Record:
    """One request. `end` is called once, however it ended."""

    metrics: Metrics
    request_id: str
    endpoint: str
    model: str = ""
    is_stream: bool = False
    instance: int = 0
    num_retries: int = 0
    num_migrations: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    finish: str = ""
    error: MeshError | None = None
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    _is_known: bool = False

    def begin(self, model: str) -> None:
        """The model is known: from here on its name may be a label (names that clients make up may not)."""
        self.model, self._is_known = model, True
        self.metrics.inflight.labels(model, self.endpoint).inc()

    def first_output(self, instance_id: int) -> None:
        """The first output arrived."""
        self.first, self.instance = time.perf_counter(), instance_id

    def fail(self, error: MeshError) -> None:
        """The request ended with an error; the first one counts."""
        self.error = self.error or error

    def end(self) -> None:
        """Count, and write the line."""
        now = time.perf_counter()
        model = self.model if self._is_known else ""
        status = "error" if self.error else "success"
        error_type = self.error.reason.lower() if self.error else ""
        kind = "stream" if self.is_stream else "unary"
        self.metrics.requests.labels(model, self.endpoint, kind, status, error_type).inc()
        if isinstance(self.error, OverloadedError):
            self.metrics.rejections.labels(model, self.endpoint).inc()
        if self._is_known:
            labels = (model, self.endpoint)
            self.metrics.inflight.labels(*labels).dec()
            self.metrics.duration.labels(*labels).observe(now - self.started)
            self.metrics.input_tokens.labels(*labels).inc(self.prompt_tokens)
            self.metrics.output_tokens.labels(*labels).inc(self.output_tokens)
            for kind, count in (("new_request", self.num_retries), ("ongoing_request", self.num_migrations)):
                if count:
                    self.metrics.migrations.labels(model, kind).inc(count)
            if self.first is not None:
                self.metrics.ttft.labels(*labels).observe(self.first - self.started)
        logger.info(
            "%s %s model=%s status=%s%s tokens=%d+%d ttft_ms=%s total_ms=%.1f instance=%s%s",
            self.request_id,
            self.endpoint,
            self.model or "-",
            self.error.http_status if self.error else 200,
            f" error={error_type} ({self.error.message[:200]})" if self.error else f" finish={self.finish or '-'}",
            self.prompt_tokens,
            self.output_tokens,
            f"{(self.first - self.started) * 1e3:.1f}" if self.first is not None else "-",
            (now - self.started) * 1e3,
            f"{self.instance:016x}" if self.instance else "-",
            f" migrations={self.num_migrations}" if self.num_migrations else "",
        )
