"""What an operator looks at: the requests that run now, the last that failed, and why a request would go where."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

from dynamo_frontend.catalog import Model
from dynamo_frontend.record import Record
from dynamo_grpc import RouterMode

#: So many failed requests are kept, and so many running ones are shown.
_MAX_ERRORS, _MAX_SHOWN = 100, 1_000


class Book:
    """The requests that run, and the last that failed."""

    def __init__(self) -> None:
        self._running: dict[int, Record] = {}
        self._errors: deque[dict[str, Any]] = deque(maxlen=_MAX_ERRORS)

    def add(self, record: Record) -> None:
        """A request began; it tells its end itself."""
        self._running[id(record)] = record
        record.on_end = self._ended

    def _ended(self, record: Record) -> None:
        self._running.pop(id(record), None)
        if record.error is not None:
            self._errors.append(
                {
                    "at": time.time(),
                    "id": record.request_id,
                    "endpoint": record.endpoint,
                    "model": record.model,
                    "status": record.error.http_status,
                    "error_type": record.error.reason.lower(),
                    "message": record.error.message[:500],
                    "instance": record.where,
                }
            )

    def lines(self) -> Iterator[str]:
        """A line for each request that runs."""
        for row in self.requests():
            where = f"model={row['model']} instance={row['instance']}"
            yield f"{row['id']} {row['endpoint']} {where} {row['phase']}, {row['age_s']} s old, {row['tokens']} tokens"

    def requests(self) -> list[dict[str, Any]]:
        """Those that run, the oldest first."""
        now = time.perf_counter()
        records = sorted(self._running.values(), key=lambda record: record.started)
        return [
            {
                "id": record.request_id,
                "endpoint": record.endpoint,
                "model": record.model,
                "phase": record.phase,
                "instance": record.where,
                "age_s": round(now - record.started, 3),
                "silent_s": round(now - record.last, 3) if record.last else None,
                "prompt_tokens": record.prompt_tokens,
                "tokens": record.num_tokens,
                "num_retries": record.num_retries,
            }
            for record in records[:_MAX_SHOWN]
        ]

    def told(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {"num_running": len(self._running), "requests": self.requests(), "errors": list(self._errors)[::-1]}


def explain(model: Model, mode: RouterMode, limit: int | None = None) -> dict[str, Any]:
    """Where the model's next request would go, and what speaks for and against each worker.

    The lower the score, the sooner one is chosen; equal ones by chance.

    Args:
        limit: so many workers are told, the best first.
    """
    instances, router = model.instances, model.router
    reasons = {live.key: instances.why_not(live) for live in instances.all()}
    candidates = [live for live in instances.all() if not reasons[live.key]]
    scores = dict(zip([live.key for live in candidates], router.scores(mode, candidates), strict=True))
    best = min(scores.values(), default=None)
    listed = instances.all()
    if limit is not None:
        listed = sorted(listed, key=lambda live: scores.get(live.key, math.inf))[:limit]
    return {
        "model": model.card.name,
        "router_mode": mode.value,
        "chosen": [f"{live.instance_id:016x}" for live in candidates if scores[live.key] == best],
        "workers": [
            {
                "instance_id": f"{live.instance_id:016x}",
                "address": live.instance.address,
                "num_inflight": live.num_inflight,
                "score": scores.get(live.key),
                "left_out_because": reasons[live.key] or None,
            }
            for live in listed
        ],
    }
