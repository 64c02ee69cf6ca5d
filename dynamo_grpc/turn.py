"""A request's turn at its endpoint: waited for, held to its client's limit, and given on."""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from opentelemetry import trace

from dynamo_grpc import semconv
from dynamo_grpc.errors import ResponseTimeoutError

if TYPE_CHECKING:
    from dynamo_grpc.requests import Running
    from dynamo_grpc.server import Served


class Turn:
    """The turn of one request; use it with `async with`.

    A client can't know when a request that waits has its turn, so it has no limit for the first output of such a one:
    the worker holds its handler to it from here on.

    Attributes:
        has_come: False if the request was stopped before.
        has_output: whether the handler has given something.
    """

    def __init__(self, served: Served, running: Running, priority: int = 0, *, is_resumed: bool = False) -> None:
        self._served, self._running = served, running
        self._priority, self._is_resumed = priority, is_resumed
        self._timer: asyncio.TimerHandle | None = None
        self._has_waited = False
        self._since = 0.0
        self.has_come = self.has_output = False

    async def _wait(self) -> None:
        self._has_waited = True
        trace.get_current_span().add_event(semconv.QUEUED)
        await self._running.sender.tell_queued()

    async def __aenter__(self) -> Self:
        came, served, context = time.monotonic(), self._served, self._running.context
        self.has_come = await served.admission.enter(
            context, self._priority, is_resumed=self._is_resumed, on_wait=self._wait
        )
        self._since = time.monotonic()
        if self.has_come and self._has_waited:
            trace.get_current_span().add_event(semconv.TURN)
            if served.metrics is not None:
                served.metrics.queue.observe(self._since - came)
            if limit_s := self._running.first_output_s:
                self._timer = asyncio.get_running_loop().call_later(limit_s, self._look)
        return self

    def output(self) -> None:
        """The handler gave something, for the first time."""
        self.has_output = True
        if self._served.metrics is not None:
            self._served.metrics.first_output.observe(time.monotonic() - self._since)

    def _look(self) -> None:
        if not self.has_output:
            limit_s = self._running.first_output_s
            text = f"the handler gave no output for {limit_s:g} s after its turn came"
            self._running.end(ResponseTimeoutError(text))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.has_come:
            self._served.admission.leave()
        if self._timer is not None:
            self._timer.cancel()
