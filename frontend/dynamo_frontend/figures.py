"""From what a frontend tells at two moments to rates and percentiles: what `dynamo-grpc top` shows. No I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

#: Rates and percentiles are of the last so many seconds.
WINDOW_S = 10.0

#: A sample: its name, and its labels in order of their names.
Key = tuple[str, tuple[tuple[str, str], ...]]


@dataclass(frozen=True, slots=True)
class Moment:
    """What was told at one moment.

    Attributes:
        at_s: when, by a clock that only goes forward.
        health: the answer of /health.
        debug: the answer of /debug/requests.
    """

    at_s: float
    samples: Mapping[Key, float]
    health: Mapping[str, Any]
    debug: Mapping[str, Any]

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        wanted = set(labels.items())
        return sum(value for (found, has), value in self.samples.items() if found == name and wanted <= set(has))


def read_metrics(text: str) -> dict[Key, float]:
    """The samples of a page in Prometheus' text format."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@dataclass(frozen=True, slots=True)
class ModelRow:
    """A model, as it is now."""

    name: str
    num_workers: int
    num_running: int
    num_queued: int
    requests_per_s: float
    errors_per_s: float
    tokens_per_s: float
    ttft_s: tuple[float, float]
    gap_s: tuple[float, float]


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker, as it is now. Unknown is None: one in another language needn't tell its metrics."""

    instance_id: str
    address: str
    model: str
    state: str
    num_running: float | None
    num_queued: float | None
    requests_per_s: float
    tokens_per_s: float
    blocks: float | None


@dataclass
class History:
    """The last moments."""

    moments: deque[Moment] = field(default_factory=deque)

    def add(self, moment: Moment) -> None:
        """Another one; those before the window go."""
        self.moments.append(moment)
        while len(self.moments) > 2 and self.moments[1].at_s <= moment.at_s - WINDOW_S:
            self.moments.popleft()

    def _rate(self, name: str, **labels: str) -> float:
        first, last = self.moments[0], self.moments[-1]
        if last.at_s <= first.at_s:
            return 0.0
        before, now = first.total(name, **labels), last.total(name, **labels)
        return (now - before if now >= before else now) / (last.at_s - first.at_s)  # one that began again counts from 0

    def _percentiles(self, name: str, **labels: str) -> tuple[float, float]:
        """Median and 99th percentile of a histogram; NaN where nothing was counted."""
        first, last = self.moments[0], self.moments[-1]
        counts: dict[float, float] = {}
        for (found, has), value in last.samples.items():
            if found == f"{name}_bucket" and set(labels.items()) <= set(has):
                limit = float(dict(has)["le"])
                counts[limit] = counts.get(limit, 0.0) + value - (first.samples.get((found, has), 0.0))
        return percentile(counts, 0.5), percentile(counts, 0.99)

    def models(self) -> list[ModelRow]:
        """All models that have a worker, or had a request."""
        last = self.moments[-1]
        names = {dict(has)["model"] for (name, has) in last.samples if name == "dynamo_frontend_model_workers"}
        return [
            ModelRow(
                name,
                int(last.total("dynamo_frontend_model_workers", model=name)),
                int(last.total("dynamo_frontend_inflight_requests", model=name)),
                int(last.total("dynamo_frontend_queued_requests", model=name)),
                self._rate("dynamo_frontend_requests_total", model=name),
                self._rate("dynamo_frontend_requests_total", model=name, status="error"),
                self._rate("dynamo_frontend_output_tokens_total", model=name),
                self._percentiles("dynamo_frontend_time_to_first_token_seconds", model=name),
                self._percentiles("dynamo_frontend_inter_token_latency_seconds", model=name),
            )
            for name in sorted(names)
        ]

    def workers(self) -> list[WorkerRow]:
        """All workers that the frontend knows."""
        last = self.moments[-1]
        told = {dict(has).get("worker_id") for (name, has) in last.samples if name == "dynamo_component_requests_total"}
        rows = []
        for instance in last.health.get("instances", ()):
            worker = instance["instance_id"]
            is_told = worker in told

            def of(name: str, worker: str = worker, is_told: bool = is_told) -> float | None:
                return last.total(f"dynamo_component_{name}", worker_id=worker) if is_told else None

            all_blocks = of("total_blocks")
            used = of("used_blocks")
            rows.append(
                WorkerRow(
                    worker,
                    instance["address"],
                    instance["model"],
                    "serves" if instance.get("is_listed", True) else "kept",
                    of("inflight_requests"),
                    of("queued_requests"),
                    self._rate("dynamo_component_requests_total", worker_id=worker),
                    self._rate("dynamo_component_output_tokens_total", worker_id=worker),
                    used / all_blocks if used is not None and all_blocks else None,
                )
            )
        return rows

    def errors(self) -> list[Mapping[str, Any]]:
        """The last requests that failed, newest first."""
        return list(self.moments[-1].debug.get("errors", ()))


def percentile(counts: Mapping[float, float], share: float) -> float:
    """A percentile from cumulative buckets by their upper limits, as Prometheus' histogram_quantile; NaN if empty."""
    limits = sorted(counts)
    if not limits or counts[limits[-1]] <= 0:
        return math.nan
    wanted = share * counts[limits[-1]]
    low, below = 0.0, 0.0
    for limit in limits:
        if counts[limit] >= wanted:
            if math.isinf(limit):
                return low
            within = counts[limit] - below
            return low + (limit - low) * ((wanted - below) / within if within else 1.0)
        low, below = limit, counts[limit]
    return low
