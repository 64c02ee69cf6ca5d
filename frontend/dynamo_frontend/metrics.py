"""What the frontend measures, and how it is told to Prometheus.

Names are Dynamo's where they mean the same; times are in seconds. A model that is asked for the first time gets series
of its own, up to MAX_MODELS of them: later ones share the label "other", so that memory and a scrape stay bounded.
"""

from __future__ import annotations

import asyncio
import bisect
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from dynamo_frontend.processes import METRICS_DIR
from dynamo_grpc import ConfigurationError


def from_environment(name: str, default: int) -> int:
    """A number of 1 or more from a variable.

    Raises:
        ConfigurationError: it is none.
    """
    text = os.environ.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigurationError(f"{name} is {text!r}: it must be a whole number of 1 or more")
    return int(text)


#: So many models have series of their own: some 220 each.
MAX_MODELS = from_environment("DYN_METRICS_MAX_MODELS", 200)
#: What the others are called.
OTHER = "other"

disable_created_metrics()  # when each series began: as many again, and nobody asks

_SHORT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_FIRST_S = (*_SHORT_S, 30, 60, 120, 300, 600)
_WHOLE_S = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
GAP_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_STEP_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
_TOKENS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

#: How often the event loop is asked how late it is, and what counts as a stall.
_LOOK_S, STALL_S = 0.1, 0.1


class Gaps:
    """Times between tokens of one request, counted by bucket: cheaper than an observation for each token."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(GAP_S) + 1)
        self.total_s = 0.0

    def add(self, gap_s: float, num_tokens: int, num_choices: int = 1) -> None:
        """So many tokens of so many choices came together, so long after those before."""
        gap_s *= num_choices
        self.counts[bisect.bisect_left(GAP_S, gap_s / num_tokens)] += num_tokens
        self.total_s += gap_s


@dataclass(frozen=True, slots=True)
class Series:
    """The series of one model at one endpoint of the API."""

    started: Counter
    inflight: Gauge
    queued: Gauge
    duration: Histogram
    ttft: Histogram
    gaps: Histogram
    prompt_length: Histogram
    output_length: Histogram
    cached: Histogram
    prompt_tokens: Counter
    output_tokens: Counter
    preprocess: Histogram
    route: Histogram
    first_output: Histogram

    def add_gaps(self, gaps: Gaps) -> None:
        """What `observe` does for each, at once."""
        for bucket, count in zip(self.gaps._buckets, gaps.counts, strict=True):
            if count:
                bucket.inc(count)
        self.gaps._sum.inc(gaps.total_s)


@dataclass(frozen=True, slots=True)
class PreparingSeries:
    """The series of what is done to prepare a model's requests."""

    template: Histogram
    tokenize: Histogram
    cache_hits: Counter
    cache_misses: Counter

    def looked_up(self, num_hits: int, num_misses: int) -> None:
        """Pieces of a prompt were looked for in the tokenizer's cache."""
        self.cache_hits.inc(num_hits)
        self.cache_misses.inc(num_misses)


class Metrics:
    """The frontend's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._series: dict[tuple[str, str, str], Series] = {}
        self._models: set[str] = set()
        self._pairs: set[tuple[str, str]] = set()  # a model may be served in several namespaces
        labels = ("dynamo_namespace", "model", "endpoint")

        def counter(name: str, text: str, labels: Sequence[str] = labels) -> Counter:
            return Counter(f"dynamo_frontend_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, labels: Sequence[str] = labels, mode: str = "livesum") -> Gauge:
            return Gauge(f"dynamo_frontend_{name}", text, labels, registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]

        def histogram(name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = labels) -> Histogram:
            return Histogram(f"dynamo_frontend_{name}", text, labels, buckets=buckets, registry=self.registry)

        self.requests = counter(
            "requests",
            "Requests that have ended, by how. Models that are not known have no name here.",
            (*labels, "request_type", "status", "error_type"),
        )
        self._started = counter("requests_started", "Requests for a model that is known.")
        self._inflight = gauge("inflight_requests", "Requests that run now.")
        self._queued = gauge("queued_requests", "Requests that run now and have no output yet.")
        self._duration = histogram("request_duration_seconds", "Seconds from a request's arrival to its end.", _WHOLE_S)
        self._ttft = histogram(
            "time_to_first_token_seconds", "Seconds from a request's arrival to its first output.", _FIRST_S
        )
        self._gaps = histogram(
            "inter_token_latency_seconds",
            "Seconds between two tokens of a choice; of tokens that come together, their time in equal parts.",
            GAP_S,
        )
        self._prompt_length = histogram("input_sequence_tokens", "Tokens in the prompts of a request.", _TOKENS)
        self._output_length = histogram("output_sequence_tokens", "Tokens in the answer to a request.", _TOKENS)
        self._cached = histogram(
            "cached_tokens", "Tokens of a request's prompts that its worker had in a cache, if it says.", _TOKENS
        )
        self._prompt_tokens = counter("input_tokens", "Tokens of prompts.")
        self._output_tokens = counter("output_tokens", "Tokens generated.")
        self._stages = histogram(
            "stage_duration_seconds",
            "Seconds that a request spends in a stage: preprocess (template, tokens, checks), route (choosing a worker "
            "and opening the call), first_output (from there to the worker's first output).",
            _FIRST_S,
            (*labels, "stage"),
        )
        self.migrations = counter(
            "model_migration",
            "Requests that were sent to another worker: before their first output (new_request) or after it.",
            ("dynamo_namespace", "model", "migration_type"),
        )
        self.rejections = counter(
            "model_rejection", "Requests that were refused because the model's workers, or the frontend, had no room."
        )
        self.cancellations = counter(
            "model_cancellation", "Requests that ended because their client went away or took nothing."
        )
        self._template = histogram("template_seconds", "Seconds of rendering a chat template.", _STEP_S, ("model",))
        self._tokenize = histogram("tokenize_seconds", "Seconds of tokenizing a prompt.", _STEP_S, ("model",))
        self._cache_hits = counter("tokenizer_cache_hits", "Pieces of prompts whose tokens were known.", ("model",))
        self._cache_misses = counter("tokenizer_cache_misses", "Pieces of prompts that were tokenized.", ("model",))
        self.loop_delay = histogram(
            "event_loop_delay_seconds", "Seconds that the event loop was late, ten times a second.", _SHORT_S, ()
        )
        self.loop_stalls = counter(
            "event_loop_stall", f"Times that the event loop was late by {STALL_S * 1e3:.0f} ms or more.", ()
        )
        self.backend_errors = counter(
            "custom_backend_errors",
            "Times that an instance of --custom-backend-metrics-endpoint gave no figures that can be used, by why.",
            ("dynamo_namespace", "dynamo_component", "dynamo_endpoint", "error_type"),
        )
        self.worker_errors = counter(
            "worker_metrics_errors",
            "Times that a worker's metrics could not be told with all, by why.",
            ("error_type",),
        )
        self.registry_up = gauge(
            "registry_up",
            "1 while all works that is done with the registry, 0 while what was known goes on serving.",
            (),
            "livemin",
        )

    def label(self, model: str) -> str:
        """The name that a model has here."""
        if model not in self._models:
            if len(self._models) >= MAX_MODELS:
                return OTHER
            self._models.add(model)
        return model

    def labels(self, namespace: str, model: str) -> tuple[str, str]:
        """The names that a namespace and its model have here."""
        pair = (namespace, model)
        if pair not in self._pairs:
            if len(self._pairs) >= MAX_MODELS or self.label(model) == OTHER:
                return OTHER, OTHER
            self._pairs.add(pair)
        return pair

    def of(self, namespace: str, model: str, endpoint: str) -> Series:
        """The series of a model that is known, at an endpoint of the API."""
        found = self._series.get((namespace, model, endpoint))
        if found is None:
            labels = (*self.labels(namespace, model), endpoint)

            def child(metric: MetricWrapperBase, *more: str):  # type: ignore[no-untyped-def]  # of its own kind
                return metric.labels(*labels, *more)

            found = Series(
                child(self._started),
                child(self._inflight),
                child(self._queued),
                child(self._duration),
                child(self._ttft),
                child(self._gaps),
                child(self._prompt_length),
                child(self._output_length),
                child(self._cached),
                child(self._prompt_tokens),
                child(self._output_tokens),
                *(child(self._stages, stage) for stage in ("preprocess", "route", "first_output")),
            )
            if labels[:2] == (namespace, model):
                self._series[namespace, model, endpoint] = found
        return found

    def preparing(self, model: str) -> PreparingSeries:
        """The series of what is done to prepare a model's requests."""
        name = self.label(model)
        return PreparingSeries(
            self._template.labels(name),
            self._tokenize.labels(name),
            self._cache_hits.labels(name),
            self._cache_misses.labels(name),
        )

    def text(self, more: Iterable[Metric] = ()) -> bytes:
        """All of them in Prometheus' format, without when each began; of all processes, if there are several.

        Args:
            more: families that were collected elsewhere.
        """
        registry = self.registry
        if METRICS_DIR in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry) + generate_latest(_Given(more))

    async def watch_loop(self) -> None:
        """Ask again and again how late the event loop is, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LOOK_S
            await asyncio.sleep(_LOOK_S)
            late_s = max(0.0, loop.time() - due)
            self.loop_delay.observe(late_s)
            if late_s >= STALL_S:
                self.loop_stalls.inc()


class _Given(Collector):
    """Families that are there already."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        yield from self._families


def gauges(name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]) -> Metric:
    """A family of gauges, as it is now."""
    family = GaugeMetricFamily(f"dynamo_frontend_{name}", text, labels=labels)
    for names, value in values:
        family.add_metric(names, value)
    return family
