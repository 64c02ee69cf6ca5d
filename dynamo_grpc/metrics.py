"""What a worker counts of its requests, for its system port's /metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dynamo_grpc.server import Server

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class ServerMetrics(Collector):
    """The metrics of one server, in a registry of their own."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.cancel_to_stop = Histogram(
            "dynamo_component_cancel_to_stop_seconds",
            "Seconds from a request's cancel (client gone, time over, handed over) to the end of its handler.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens_after_cancel = Counter(
            "dynamo_component_tokens_after_cancel",
            "Tokens that a handler gave after its request's cancel: work for nobody.",
            ("endpoint",),
            registry=self.registry,
        )
        self.handed_over = Counter(
            "dynamo_component_handed_over_requests",
            "Running requests that were given back because the worker left: they go on elsewhere.",
            ("endpoint",),
            registry=self.registry,
        )

    def collect(self) -> Iterator[Metric]:
        """What is read when it is asked for."""
        server = self._server
        is_up = server.registry is None or not server.registry.problem
        yield GaugeMetricFamily(
            "dynamo_component_inflight_requests", "Requests that run or wait now.", len(server.requests)
        )
        yield GaugeMetricFamily(
            "dynamo_component_registry_up", "Whether all works that is done with the registry: 1 or 0.", int(is_up)
        )
        queued = GaugeMetricFamily(
            "dynamo_component_queued_requests", "Requests that wait for their turn (max_queued).", labels=("endpoint",)
        )
        refused = CounterMetricFamily(
            "dynamo_component_refused_requests",
            "Requests that found no room since the start (max_concurrent and max_queued).",
            labels=("endpoint",),
        )
        for served in server.served.values():
            queued.add_metric((served.name,), served.admission.num_waiting)
            refused.add_metric((served.name,), served.admission.num_refused)
        yield queued
        yield refused

    def text(self) -> bytes:
        """All of them in Prometheus' format."""
        return generate_latest(self.registry)
