"""Custom back ends' own figures: their `runtime_stats` endpoint is asked again and again, at all instances.

An instance answers with JSON (as a string or as a value):

    {"schema_version": 1, "worker_id": "w1", "backend": "nim", "ts": 1700000000,
     "metrics": {"gauges": {"kv_cache_usage_perc": 0.5}, "counters": {"steps": 12},
                 "histograms": {"step_seconds": {"buckets": {"0.1": 3, "1": 4}, "sum": 1.5, "count": 5}}}}

Buckets count all up to their limit. What an instance says is told as `dynamo_component_NAME` until it is gone, or has
said nothing new for three intervals.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import logging
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import Metric

from dynamo_frontend.metrics import Metrics
from dynamo_grpc import Context, DistributedRuntime, MeshError
from dynamo_grpc.client import Client
from dynamo_grpc.metrics import EndpointMetrics
from dynamo_grpc.names import EndpointName

logger = logging.getLogger(__name__)

PREFIX = "dynamo_component_"
#: An instance may take so long to answer, or one interval if that is shorter.
_LIMIT_S = 5.0
#: So many instances are asked at once, and so many names of each are taken.
_MAX_AT_ONCE, _MAX_NAMES = 64, 1_000
#: What one instance says has so many samples, characters, and characters in a name.
_MAX_SAMPLES, _MAX_CHARS, _MAX_NAME_CHARS = 2_000, 1024 * 1024, 200
#: The log has what is wrong with an instance once in so long; of one, so many different things.
_AGAIN_S, _MAX_TOLD = 600.0, 10
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
        self._told: dict[int, dict[str, float]] = {}  # what is wrong with whom, and when the log had it

    async def run(self) -> None:
        """Ask until cancelled."""
        client = await self._runtime.endpoint(str(self._name)).client()
        at_once = asyncio.Semaphore(_MAX_AT_ONCE)
        while True:
            started = time.monotonic()
            ids = client.instance_ids()
            for gone in (self._said.keys() | self._told.keys()) - set(ids):
                self._said.pop(gone, None)
                self._told.pop(gone, None)
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
            self._failed(instance_id, "timeout", f"gave no figures within {limit_s:g} s")
        except _BadStatsError as error:
            self._failed(instance_id, "format", f"gave figures that can't be used: {error}")
        except MeshError as error:
            self._failed(instance_id, error.reason.lower(), f"gave no figures: {error.message}")
        except Exception as error:  # whatever one says, the others are asked again
            self._failed(instance_id, "format", f"gave figures that can't be read: {type(error).__name__}: {error}")

    def _failed(self, instance_id: int, why: str, text: str) -> None:
        """Count it; the log has it once, and again when it is still so much later."""
        name = self._name
        self._metrics.backend_errors.labels(name.namespace, name.component, name.endpoint, why).inc()
        told, now = self._told.setdefault(instance_id, {}), time.monotonic()
        if now - told.get(text, -math.inf) > _AGAIN_S and (text in told or len(told) < _MAX_TOLD):
            told[text] = now
            logger.warning("%s at %016x %s", name, instance_id, text)

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
        families: dict[str, Metric] = {}

        def add(name: str, kind: str, samples: Iterable[tuple[str, dict[str, str], float]]) -> None:
            made = families.setdefault(name, Metric(PREFIX + name, f"As the back ends of {self._name} say.", kind))
            for suffix, labels, value in samples if made.type == kind else ():  # a name is of one kind
                made.add_sample(f"{PREFIX}{name}{suffix}", labels, value)

        for said in self._said.values():
            if said.changed_at < oldest:
                continue
            for name, value in said.gauges.items():
                add(name, "gauge", [("", said.labels, value)])
            for name, value in said.counters.items():
                add(name, "counter", [("_total", said.labels, value)])
            for name, (buckets, total, count) in said.histograms.items():
                rows = [("_bucket", {**said.labels, "le": limit}, value) for limit, value in buckets.items()]
                add(name, "histogram", [*rows, ("_count", said.labels, count), ("_sum", said.labels, total)])
        taken: set[str] = set()
        for name, made in families.items():  # two of one name would make the whole page unreadable
            if not (names := _sample_names(name, made.type)) & taken:
                taken |= names
                yield made


@functools.cache
def _built_in() -> frozenset[str]:
    """The names that workers' own metrics have."""
    return EndpointMetrics().names


def _sample_names(name: str, kind: str) -> set[str]:
    """All names that a metric has samples or a description under."""
    suffixes = {"counter": ("_total",), "histogram": ("", "_bucket", "_count", "_sum")}.get(kind, ("",))
    return {name + suffix for suffix in suffixes}


def _read(answer: Any) -> _Said:
    """What an instance said.

    Raises:
        _BadStatsError: it is of no use.
    """
    if answer is None:
        raise _BadStatsError("it ended without an answer")
    if isinstance(answer, (str, bytes)):
        if len(answer) > _MAX_CHARS:
            raise _BadStatsError(f"it has {len(answer)} characters: at most {_MAX_CHARS}")
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
        "backend": _text(answer.get("backend", "")),
        "backend_worker_id": _text(answer.get("worker_id", "")),
    }
    said = _Said(labels, ts=answer.get("ts"))
    said.gauges = {name: _number(name, value) for name, value in _part(metrics, "gauges")}
    counters = [(name.removesuffix("_total"), value) for name, value in _part(metrics, "counters")]
    said.counters = {name: _number(name, value) for name, value in counters}
    said.histograms = {name: _histogram(name, value) for name, value in _part(metrics, "histograms")}
    num = len(said.gauges) + len(counters) + sum(len(buckets) + 2 for buckets, _, _ in said.histograms.values())
    if num > _MAX_SAMPLES:
        raise _BadStatsError(f"it has {num} samples: at most {_MAX_SAMPLES}")
    names = [("gauge", name) for name in said.gauges]
    names += [("counter", name) for name, _ in counters]
    names += [("histogram", name) for name in said.histograms]
    taken: set[str] = set()
    for kind, name in names:
        mine = _sample_names(name, kind)
        if any(PREFIX + one in _built_in() for one in mine):
            raise _BadStatsError(f"{name} is what the metrics of all workers are called")
        if mine & taken:
            raise _BadStatsError(f"{name} is told twice")
        taken |= mine
    return said


def _text(value: Any) -> str:
    """As a label may be."""
    return str(value)[:100].encode(errors="replace").decode()


def _part(metrics: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    part = metrics.get(kind) or {}
    if not isinstance(part, Mapping):
        raise _BadStatsError(f"metrics.{kind} is no object")
    if len(part) > _MAX_NAMES:
        raise _BadStatsError(f"metrics.{kind} has {len(part)} names: at most {_MAX_NAMES}")
    for name in part:
        if not isinstance(name, str) or len(name) > _MAX_NAME_CHARS or not _NAME.fullmatch(name):
            raise _BadStatsError(f"{name!r:.60} can't be the name of a metric")
    return [(name.removeprefix(PREFIX), value) for name, value in part.items()]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _BadStatsError(f"{name} is {value!r:.60}, no number")
    try:
        return float(value)
    except OverflowError:
        raise _BadStatsError(f"{name} is too large") from None


def _histogram(name: str, value: Any) -> tuple[dict[str, float], float, float]:
    """Its buckets by their limit as Prometheus writes it, sum and count."""
    if not isinstance(value, Mapping) or not isinstance(value.get("buckets"), Mapping):
        raise _BadStatsError(f"{name} is no object with `buckets`, `sum` and `count`")
    count, total = _number(f"{name}.count", value.get("count")), _number(f"{name}.sum", value.get("sum"))
    limits: dict[float, float] = {math.inf: count}
    for text, at_most in value["buckets"].items():
        try:
            limit = float(text)
        except (TypeError, ValueError):
            limit = math.nan
        if math.isnan(limit):
            raise _BadStatsError(f"{name}.buckets has the limit {text!r:.60}, no number")
        limits[limit] = _number(f"{name}.buckets.{text:.60}", at_most)
    ordered = sorted(limits.items())
    if any(later < earlier for (_, earlier), (_, later) in itertools.pairwise(ordered)):
        raise _BadStatsError(f"{name}.buckets are not cumulative")
    return {"+Inf" if math.isinf(limit) else repr(limit): at_most for limit, at_most in ordered}, total, count
