"""The health check of an endpoint: a request of its own that must give an output, at the start and, if asked for, when
nobody else asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from google.protobuf.message import Message

from dynamo_grpc.client import to_preprocessed_request
from dynamo_grpc.context import Context
from dynamo_grpc.messages import from_dict, to_dict
from dynamo_grpc.server import Served
from dynamo_grpc.v1 import inference_pb2
from dynamo_grpc.validation import makes_vectors_alone, with_defaults

logger = logging.getLogger(__name__)

#: How long the first one may take, and the pause before the next try, in seconds.
_FIRST_S, _AGAIN_S = 30.0, 5.0


class Canary:
    """Checks one endpoint by its handler, in process.

    Args:
        payload: the request; for a model a dict of PreprocessedRequest's fields or a list of token ids, or of
            EmbedRequest's if it makes vectors.
        wait_s: check again after so long without another request; None is never.
        limit_s: how long such a check may take.
    """

    def __init__(self, served: Served, payload: Any, wait_s: float | None = None, limit_s: float = 3.0) -> None:
        self._served, self._wait_s, self._limit_s = served, wait_s, limit_s
        if served.card:
            message: Message
            if makes_vectors_alone(served.card):
                message = from_dict(payload, inference_pb2.EmbedRequest())
            else:
                message = with_defaults(to_preprocessed_request(payload), served.card)
            self._payload: Any = to_dict(message) if served.gives_dicts else message
        else:
            self._payload = payload

    @classmethod
    def from_environment(cls, served: Served, payload: Any) -> Canary:
        """As DYN_HEALTH_CHECK_ENABLED, DYN_CANARY_WAIT_TIME and DYN_HEALTH_CHECK_REQUEST_TIMEOUT say."""
        is_on = os.environ.get("DYN_HEALTH_CHECK_ENABLED", "").lower() in ("1", "true", "yes")
        wait_s = float(os.environ.get("DYN_CANARY_WAIT_TIME") or 10)
        limit_s = float(os.environ.get("DYN_HEALTH_CHECK_REQUEST_TIMEOUT") or 3)
        return cls(served, payload, wait_s if is_on else None, limit_s)

    async def _problem(self, limit_s: float) -> str:
        """What is wrong, in a few words; empty when it gave an output."""

        async def ask() -> str:
            async with contextlib.aclosing(self._served.handler(self._payload, Context("health-check"))) as items:
                async for _ in items:
                    return ""
            return "it ended without an output"

        task = asyncio.ensure_future(ask())
        try:
            await asyncio.wait((task,), timeout=limit_s)  # not longer, also if its own end takes for ever
            if not task.done():
                return f"no output after {limit_s:g} s"
            if task.cancelled():
                return "CancelledError"
            error = task.exception()
            return task.result() if error is None else f"{type(error).__name__}: {error}"
        finally:
            task.cancel()

    async def wait_healthy(self) -> None:
        """Return when it gives an output; tried again until then."""
        while problem := await self._problem(_FIRST_S):
            logger.error("health check of %s failed, trying again: %s", self._served.name, problem)
            await asyncio.sleep(_AGAIN_S)

    async def run(self, on_change: Callable[[], Awaitable[None]]) -> None:
        """Check whenever nobody asked for a while; `on_change` is told when it began or ceased to fail."""
        served = self._served
        while self._wait_s is not None:
            count = served.admission.num_entered
            await asyncio.sleep(self._wait_s)
            if not served.sick_because and (served.admission.num_running or served.admission.num_entered != count):
                continue  # its requests show how it is
            before, served.sick_because = served.sick_because, await self._problem(self._limit_s)
            if bool(before) != bool(served.sick_because):
                level = logging.ERROR if served.sick_because else logging.INFO
                logger.log(level, "health check of %s: %s", served.name, served.sick_because or "it is well again")
                await on_change()
