"""What a worker measures, and tells Prometheus at its system port and by Control.GetMetrics.

Each endpoint has its own metrics, without labels: who it is (namespace, component, endpoint, model, worker) is added
when they are read. So an endpoint's author uses prometheus_client as it is, and counting costs no look-up.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric, Sample
from prometheus_client.registry import Collector

from dynamo_grpc.errors import ConfigurationError

if TYPE_CHECKING:
    from dynamo_grpc.server import Served, Server

logger = logging.getLogger(__name__)

PREFIX = "dynamo_component_"
#: Labels that every series of an endpoint has.
HIERARCHY = ("dynamo_namespace", "dynamo_component", "dynamo_endpoint", "model", "worker_id")
#: An endpoint tells so many samples of one metric that it added itself; the others are left out, which is logged once.
MAX_SAMPLES = 1_000

#: What is told of an endpoint and of its worker without being counted.
_RESERVED = frozenset(
    f"{PREFIX}{name}"
    for name in (
        "inflight_requests", "queued_requests", "refused_requests", "total_blocks", "used_blocks", "prefill_tokens",
        "registry_up", "uptime_seconds",
    )
)  # fmt: skip
#: So many reasons of errors are told apart.
_MAX_REASONS = 100
_LABEL = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_NO_LABELS = ("le", "quantile", "__name__")
_STOP_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_FIRST_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_LONG_S = (0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class EndpointMetrics:
    """The metrics of one endpoint: those that every endpoint has, and those that its author adds.

    What is added is told as `dynamo_component_NAME` with the endpoint's labels: `dynamo_namespace`, `dynamo_component`,
    `dynamo_endpoint`, `model` and `worker_id`.
    """

    def __init__(self) -> None:
        self.built_in, self.own = CollectorRegistry(), CollectorRegistry()
        self.attached: list[CollectorRegistry] = []
        self._reasons: set[str] = set()
        self.requests = self._counter("requests", "Requests that have ended.")
        self.errors = self._counter("errors", "Requests that ended with an error, by its reason.", ("error_type",))
        self.cancellations = self._counter("cancellation", "Requests whose client left or cancelled.")
        self.duration = self._histogram(
            "request_duration_seconds", "Seconds from a request's call to its end.", _LONG_S
        )
        self.first_output = self._histogram(
            "time_to_first_output_seconds", "Seconds from a request's turn to its handler's first output.", _FIRST_S
        )
        self.queue = self._histogram(
            "queue_seconds", "Seconds that a request waited for its turn (max_concurrent), if it had to.", _FIRST_S
        )
        self.output_tokens = self._counter("output_tokens", "Tokens that handlers generated.")
        self.cancel_to_stop = self._histogram(
            "cancel_to_stop_seconds",
            "Seconds from a request's cancel (client gone, time over, handed over) to the end of its handler.",
            _STOP_S,
        )
        self.tokens_after_cancel = self._counter(
            "tokens_after_cancel", "Tokens that a handler gave after its request's cancel: work for nobody."
        )
        self.handed_over = self._counter(
            "handed_over_requests", "Running requests that were given back because the worker left."
        )

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.built_in)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.built_in)

    def failed(self, reason: str) -> None:
        """A request ended with an error; reasons that handlers make up are bounded."""
        name = reason.lower() if _LABEL.fullmatch(reason) and len(reason) <= 64 else "other"
        if name not in self._reasons:
            name = name if len(self._reasons) < _MAX_REASONS else "other"
            self._reasons.add(name)
        self.errors.labels(name).inc()

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        """Add a counter of your own; a prometheus_client.Counter.

        Raises:
            ConfigurationError: there is one of the name, or the name or a label can't be used.
        """
        return Counter(self._name(name, labels), text, labels, registry=self.own)

    def gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        """Add a gauge of your own, as `counter`; `set_function` has it asked when it is read."""
        return Gauge(self._name(name, labels), text, labels, registry=self.own)

    def histogram(
        self, name: str, text: str, labels: Sequence[str] = (), buckets: Sequence[float] = Histogram.DEFAULT_BUCKETS
    ) -> Histogram:
        """Add a histogram of your own, as `counter`."""
        return Histogram(self._name(name, labels), text, labels, buckets=buckets, registry=self.own)

    def attach(self, registry: CollectorRegistry) -> None:
        """Tell an engine's own metrics too, under their own names, with the endpoint's labels added."""
        if registry not in self.attached:
            self.attached.append(registry)

    @property
    def names(self) -> frozenset[str]:
        """All that its series are called, of those that every endpoint has."""
        return frozenset(self.built_in._names_to_collectors) | _RESERVED

    def _name(self, name: str, labels: Sequence[str]) -> str:
        full = name if name.startswith(PREFIX) else PREFIX + name
        taken = {*self.names, *self.own._names_to_collectors}
        if {full, full.removesuffix("_total"), f"{full}_total"} & taken:
            raise ConfigurationError(f"there is a metric {full} already")
        if not _LABEL.fullmatch(name):
            raise ConfigurationError(f"{name!r} can't be the name of a metric: letters, digits and _")
        for label in labels:
            is_taken = label in HIERARCHY or label in _NO_LABELS or labels.count(label) > 1
            if is_taken or label.startswith("__") or not _LABEL.fullmatch(label):
                raise ConfigurationError(f"metric {name}: {label!r} can't be a label of it")
        return full


class ServerMetrics(Collector):
    """The metrics of one server: of its endpoints, with who they are."""

    def __init__(self, server: Server) -> None:
        self._server, self._since = server, time.monotonic()
        self._told: set[str] = set()

    def collect(self) -> Iterator[Metric]:
        """What is read when it is asked for."""
        server = self._server
        families: dict[str, Metric] = {}
        is_up = server.registry is None or not server.registry.problem
        all_served = tuple(server.served.values())
        worker = {"worker_id": f"{all_served[0].instance.instance_id:016x}"} if all_served else {}
        for name, text, value in (
            ("registry_up", "Whether all works that is done with the registry: 1 or 0.", float(is_up)),
            ("uptime_seconds", "Seconds since the worker's start.", time.monotonic() - self._since),
        ):
            _family(families, PREFIX + name, text, "gauge").add_sample(PREFIX + name, worker, value)
        for served in all_served:
            labels = _labels(served)
            for name, text, kind, value in self._now(served):
                suffix = "_total" if kind == "counter" else ""
                _family(families, PREFIX + name, text, kind).add_sample(PREFIX + name + suffix, labels, value)
            if served.metrics is not None:
                for registry in (served.metrics.built_in, served.metrics.own, *served.metrics.attached):
                    limit = None if registry is served.metrics.built_in else MAX_SAMPLES
                    self._add(families, self._collected(registry), labels, limit)
        yield from families.values()

    def _now(self, served: Served) -> Iterator[tuple[str, str, str, float]]:
        """What is known without being counted."""
        running = sum(request.served is served for request in self._server.requests)
        admission = served.admission
        yield "inflight_requests", "Requests that run or wait now.", "gauge", running
        yield "queued_requests", "Requests that wait for their turn (max_queued).", "gauge", admission.num_waiting
        yield (
            "refused_requests",
            "Requests that found no room (max_concurrent and max_queued).",
            "counter",
            admission.num_refused,
        )
        if served.load is not None:
            load = _asked(served.load)
            for key, name, text in (
                ("num_total_blocks", "total_blocks", "Blocks of the KV cache, as the engine says."),
                ("num_used_blocks", "used_blocks", "Blocks of the KV cache in use, as the engine says."),
                ("num_prefill_tokens", "prefill_tokens", "Prompt tokens that wait for prefill, as the engine says."),
            ):
                if key in load:
                    yield name, text, "gauge", load[key]

    def _collected(self, registry: CollectorRegistry) -> Iterator[Metric]:
        """Its families; one that can't be asked now is left out, and named in the log once."""
        for collector in tuple(registry._collector_to_names):
            try:
                yield from list(collector.collect())
            except Exception as error:
                name = next(iter(registry._collector_to_names.get(collector, ())), type(collector).__name__)
                self._tell(f"metric {name} can't be told: {type(error).__name__}: {error}")

    def _add(
        self, families: dict[str, Metric], found: Iterable[Metric], labels: Mapping[str, str], limit: int | None
    ) -> None:
        """Add families with the endpoint's labels to those of others."""
        for family in found:
            target = _family(families, family.name, family.documentation, family.type)
            if target.type != family.type:
                self._tell(f"metric {family.name} is a {target.type} at one endpoint and a {family.type} at another")
                continue
            created = f"{family.name}_created" if family.type in ("counter", "histogram", "summary") else ""
            samples = [sample for sample in family.samples if sample.name != created]
            if limit is not None and len(samples) > limit:
                self._tell(f"metric {family.name} has {len(samples)} samples: only {limit} of them are told")
                samples = _first(samples, limit)
            target.samples += [sample._replace(labels=_labelled(sample.labels, labels)) for sample in samples]

    def _tell(self, problem: str) -> None:
        name = problem.split()[1]
        if name not in self._told:
            self._told.add(name)
            logger.warning(problem)

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self)


def _asked(load: Callable[[], Mapping[str, int]]) -> Mapping[str, float]:
    """What an engine says of its load; nothing if it can't now."""
    try:
        return {key: float(value) for key, value in load().items()}
    except Exception:
        logger.debug("the load could not be read", exc_info=True)
        return {}


def _family(families: dict[str, Metric], name: str, text: str, kind: str) -> Metric:
    """The family of a name, by the name that its description has."""
    shown = f"{name}_total" if kind == "counter" else name
    if shown not in families:
        families[shown] = Metric(name, text, kind)
    return families[shown]


def _first(samples: list[Sample], limit: int) -> list[Sample]:
    """So many of them at most, without the series that would be cut in its middle."""

    def series(sample: Sample) -> dict[str, str]:
        return {key: value for key, value in sample.labels.items() if key != "le"}

    kept = samples[:limit]
    while kept and series(kept[-1]) == series(samples[limit]):
        kept.pop()
    return kept


def _labelled(own: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """A sample's labels with those of its endpoint; its own stay, as Prometheus keeps them, under another name."""
    if not own:
        return dict(labels)
    renamed = {f"exported_{key}" if key in HIERARCHY else key: value for key, value in own.items()}
    return {**labels, **renamed}


def _labels(served: Served) -> dict[str, str]:
    """Who an endpoint is; its author's own labels (`metrics_labels`) too, where they can be labels."""
    instance = served.instance
    own = {key: value for key, value in instance.labels.items() if _LABEL.fullmatch(key) and key not in _NO_LABELS}
    return {
        **own,
        "dynamo_namespace": instance.namespace,
        "dynamo_component": instance.component,
        "dynamo_endpoint": instance.endpoint,
        "model": instance.model,
        "worker_id": f"{instance.instance_id:016x}",
    }
