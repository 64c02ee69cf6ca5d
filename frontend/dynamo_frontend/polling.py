"""Custom back ends' own figures: their `runtime_stats` endpoint is asked again and again, at all instances.

An instance answers with JSON (as a string or as a value):

    {"schema_version": 1, "worker_id": "w1", "backend": "nim", "ts": 1700000000,
     "metrics": {"gauges": {"kv_cache_usage_perc": 0.5}, "counters": {"requests": 12},
                 "histograms": {"step_seconds": {"buckets": {"0.1": 3, "1": 4}, "sum": 1.5, "count": 5}}}}

Buckets count all up to their limit. What an instance says is told as `dynamo_component_NAME` until it is gone, or has
said nothing new for three intervals.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import Metric

from dynamo_frontend.metrics import Metrics
from dynamo_grpc import Context, DistributedRuntime, MeshError
from dynamo_grpc.client import Client
from dynamo_grpc.names import EndpointName

logger = logging.getLogger(__name__)

PREFIX = "dynamo_component_"
#: An instance may take so long to answer, or one interval if that is shorter.
_LIMIT_S = 5.0
#: So many instances are asked at once, and so many names of each are taken.
_MAX_AT_ONCE, _MAX_NAMES = 64, 1_000
#: What an instance said is told for so many intervals.
_STALE_INTERVALS = 3.0
_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class _BadStatsError(ValueError):
    """What an instance said can't be used; its text says why."""


@dataclass(slots=True)
class _Said:
    """What an instance said last."""

    labels: dict[str, str]
    gauges: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, tuple[dict[str, float], float, float]] = field(default_factory=dict)
    ts: Any = None
    changed_at: float = 0.0


class BackendPolling:
    """Asks the instances of one endpoint.

    Args:
        endpoint: its name, as namespace.component.endpoint.
        interval_s: how often.
        metrics: where what goes wrong is counted.
    """

    def __init__(self, runtime: DistributedRuntime, endpoint: str, interval_s: float, metrics: Metrics) -> None:
        self._name = EndpointName.parse(endpoint)
        self._runtime, self._interval_s, self._metrics = runtime, interval_s, metrics
        self._said: dict[int, _Said] = {}
        self._told: set[str] = set()

    async def run(self) -> None:
        """Ask until cancelled."""
        client = await self._runtime.endpoint(str(self._name)).client()
        at_once = asyncio.Semaphore(_MAX_AT_ONCE)
        while True:
            started = time.monotonic()
            ids = client.instance_ids()
            for gone in self._said.keys() - set(ids):
                del self._said[gone]
            await asyncio.gather(*(self._ask(client, instance_id, at_once) for instance_id in ids))
            await asyncio.sleep(max(0.0, started + self._interval_s - time.monotonic()))

    async def _ask(self, client: Client, instance_id: int, at_once: asyncio.Semaphore) -> None:
        limit_s = min(self._interval_s, _LIMIT_S)
        try:
            async with at_once, asyncio.timeout(limit_s):
                async with await client.direct("", instance_id, annotated=False, context=Context()) as stream:
                    said = await anext(stream, None)
            self._take(instance_id, said)
        except TimeoutError:
            self._failed("timeout", f"{self._name} at {instance_id:016x} gave no figures within {limit_s:g} s")
        except _BadStatsError as error:
            self._failed("format", f"{self._name} at {instance_id:016x} gave figures that can't be used: {error}")
        except MeshError as error:
            self._failed(error.reason.lower(), f"{self._name} at {instance_id:016x} gave no figures: {error.message}")

    def _failed(self, why: str, text: str) -> None:
        """Count it; the log has it once."""
        self._metrics.backend_errors.labels(self._name.namespace, self._name.component, self._name.endpoint, why).inc()
        if text not in self._told:
            if len(self._told) > _MAX_NAMES:
                self._told.clear()
            self._told.add(text)
            logger.warning(text)

    def _take(self, instance_id: int, answer: Any) -> None:
        new = _read(answer)
        new.labels |= {
            "dynamo_namespace": self._name.namespace,
            "dynamo_component": self._name.component,
            "dynamo_endpoint": self._name.endpoint,
            "worker_id": f"{instance_id:016x}",
        }
        before = self._said.get(instance_id)
        is_new = before is None or new.ts is None or new.ts != before.ts
        new.changed_at = time.monotonic() if is_new or before is None else before.changed_at
        self._said[instance_id] = new

    def families(self) -> Iterator[Metric]:
        """What holds now, for Prometheus."""
        oldest = time.monotonic() - _STALE_INTERVALS * self._interval_s
        families: dict[tuple[str, str], Metric] = {}

        def family(name: str, kind: str) -> Metric:
            key = (name, kind)
            if key not in families:
                families[key] = Metric(PREFIX + name, f"As the back ends of {self._name} say.", kind)
            return families[key]

        for said in self._said.values():
            if said.changed_at < oldest:
                continue
            for name, value in said.gauges.items():
                family(name, "gauge").add_sample(PREFIX + name, said.labels, value)
            for name, value in said.counters.items():
                base = name.removesuffix("_total")
                family(base, "counter").add_sample(f"{PREFIX}{base}_total", said.labels, value)
            for name, (buckets, total, count) in said.histograms.items():
                made = family(name, "histogram")
                for limit, value in buckets.items():
                    made.add_sample(f"{PREFIX}{name}_bucket", {**said.labels, "le": limit}, value)
                made.add_sample(f"{PREFIX}{name}_count", said.labels, count)
                made.add_sample(f"{PREFIX}{name}_sum", said.labels, total)
        seen: set[str] = set()
        for (name, _), made in families.items():
            if name not in seen:  # one name is of one kind: a second one would make the whole page unreadable
                seen.add(name)
                yield made


def _read(answer: Any) -> _Said:
    """What an instance said.

    Raises:
        _BadStatsError: it is of no use.
    """
    if answer is None:
        raise _BadStatsError("it ended without an answer")
    if isinstance(answer, (str, bytes)):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise _BadStatsError(f"it is no JSON: {error}") from None
    if not isinstance(answer, Mapping):
        raise _BadStatsError(f"it is a {type(answer).__name__}, not an object")
    if answer.get("schema_version", 1) != 1:
        raise _BadStatsError(f"schema_version is {answer['schema_version']!r}, 1 is known")
    metrics = answer.get("metrics")
    if not isinstance(metrics, Mapping):
        raise _BadStatsError("it has no object `metrics`")
    labels = {
        "backend": str(answer.get("backend", ""))[:100],
        "backend_worker_id": str(answer.get("worker_id", ""))[:100],
    }
    said = _Said(labels, ts=answer.get("ts"))
    said.gauges = {name: _number(name, value) for name, value in _part(metrics, "gauges")}
    said.counters = {name: _number(name, value) for name, value in _part(metrics, "counters")}
    said.histograms = {name: _histogram(name, value) for name, value in _part(metrics, "histograms")}
    return said


def _part(metrics: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    part = metrics.get(kind) or {}
    if not isinstance(part, Mapping):
        raise _BadStatsError(f"metrics.{kind} is no object")
    if len(part) > _MAX_NAMES:
        raise _BadStatsError(f"metrics.{kind} has {len(part)} names: at most {_MAX_NAMES}")
    for name in part:
        if not _NAME.fullmatch(name):
            raise _BadStatsError(f"{name!r} can't be the name of a metric")
    return [(name.removeprefix(PREFIX), value) for name, value in part.items()]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _BadStatsError(f"{name} is {value!r:.60}, no number")
    return float(value)


def _histogram(name: str, value: Any) -> tuple[dict[str, float], float, float]:
    """Its buckets by their limit as Prometheus writes it, sum and count."""
    if not isinstance(value, Mapping) or not isinstance(value.get("buckets"), Mapping):
        raise _BadStatsError(f"{name} is no object with `buckets`, `sum` and `count`")
    count, total = _number(f"{name}.count", value.get("count")), _number(f"{name}.sum", value.get("sum"))
    limits: dict[float, float] = {math.inf: count}
    for text, at_most in value["buckets"].items():
        with contextlib.suppress(ValueError):
            limits[float(text)] = _number(f"{name}.buckets.{text}", at_most)
            continue
        raise _BadStatsError(f"{name}.buckets has the limit {text!r}, no number")
    ordered = sorted(limits.items())
    if any(later < earlier for (_, earlier), (_, later) in itertools.pairwise(ordered)):
        raise _BadStatsError(f"{name}.buckets are not cumulative")
    return {"+Inf" if math.isinf(limit) else repr(limit): at_most for limit, at_most in ordered}, total, count
