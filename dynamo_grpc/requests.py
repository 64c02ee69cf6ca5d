"""The requests that a server runs: each is one call, one context, one task; and how each ends.

A handler runs in a task of its own beside the call's, so that the moment of a cancel is known: the context is killed at
once (`on_cancel` is called then, whatever the handler does), nothing more is sent, and the time until the handler has
really ended is measured.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import grpc

from dynamo_grpc import semconv
from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.context import Context, enter_context, leave_context
from dynamo_grpc.errors import EngineShutdown, HandlerOutputError, MeshError, RequestCancelledError
from dynamo_grpc.lane import Lane, Sender
from dynamo_grpc.metadata import (
    DELIVERY,
    DELIVERY_ID,
    FIRST_OUTPUT_S,
    NUM_BY_LANE,
    REQUEST_ID,
    printable,
    to_context,
)
from dynamo_grpc.orca import LoadMeter
from dynamo_grpc.status import abort, from_exception
from dynamo_grpc.telemetry import headers, server_span

if TYPE_CHECKING:
    from dynamo_grpc.metrics import EndpointMetrics
    from dynamo_grpc.server import Served

logger = logging.getLogger(__name__)

#: A handler that has not ended so long after its cancel is named in the log.
_STUBBORN_S = 5.0

Call = grpc.aio.ServicerContext[Any, Any]


@dataclass(slots=True, eq=False)
class Running:
    """One request.

    Attributes:
        served: whose it is, once that is known.
        first_output_s: how long its client waits for a first output, if it says so.
        ended_by: why it is ended from here, if it is.
        num_tokens: generated so far.
    """

    context: Context
    sender: Sender
    served: Served | None = None
    first_output_s: float | None = None
    task: asyncio.Task[None] | None = None
    ended_by: MeshError | None = None
    num_tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        where = self.served.name if self.served is not None else "-"
        state = "cancelled" if self.context.is_killed() else "stopped" if self.context.is_stopped() else "runs"
        return f"{self.context.id()} {where} {state} for {time.monotonic() - self.started:.1f} s"

    @property
    def metrics(self) -> EndpointMetrics | None:
        """Where its figures go, once its endpoint is known."""
        return self.served.metrics if self.served is not None else None

    def end(self, error: MeshError) -> None:
        """End it with `error`. Idempotent."""
        if self.ended_by is None and self.task is not None and not self.task.done():
            self.ended_by = error
            self.context.kill()
            self.sender.cancel(self.task)


Work = Callable[[Running], Awaitable[None]]


class Requests:
    """All that run now.

    Args:
        refuse: why no request is taken now, from the metadata of one; None if it is.
        on_empty: called when the last one has ended.
        meter: measures the server for balancers.

    Attributes:
        lanes: the deliveries that are open, by name.
    """

    def __init__(
        self,
        refuse: Callable[[Mapping[str, str]], MeshError | None],
        on_empty: Callable[[], Awaitable[None]],
        meter: LoadMeter,
    ) -> None:
        self._refuse, self._on_empty, self._meter = refuse, on_empty, meter
        self._running: dict[str, Running] = {}
        self.lanes: dict[str, Lane] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __iter__(self) -> Iterator[Running]:
        return iter(tuple(self._running.values()))

    def stop(self, request_id: str) -> bool:
        """End requests of an id gently; says whether there were any."""
        found = [running for running in self if running.context.id() == request_id]
        for running in found:
            running.context.stop_generating()
        return bool(found)

    async def serve(self, call: Call, method: str, request_id: str, work: Work) -> None:
        """Run one request: `work` sends its outputs, and what it raises becomes the call's status."""
        metadata = headers(tuple(call.invocation_metadata() or ()))
        context = to_context(metadata, request_id, call.time_remaining())
        if refused := self._refuse(metadata):
            await self._abort(call, refused, context)
        sender = Sender(call, *self._lane_of(metadata))
        running = Running(context, sender, first_output_s=_seconds(metadata.get(FIRST_OUTPUT_S)))
        key = context.id() if context.id() not in self._running else f"{context.id()}/{id(context)}"
        self._running[key] = running
        token = enter_context(context)
        started, failed = time.monotonic(), ""
        try:
            attributes = {semconv.RPC_SYSTEM: "grpc", semconv.RPC_METHOD: method, semconv.REQUEST_ID: context.id()}
            with server_span(method, metadata, attributes):
                await self._run(running, work)
                call.set_trailing_metadata(self._trailers(context, sender.num_by_lane))
        except asyncio.CancelledError:
            context.kill()
            failed = RequestCancelledError.reason
            if is_being_cancelled():
                raise  # the call was cancelled, or its time is over
            await self._abort(call, RequestCancelledError("the handler cancelled the request"), context, sender)
        except (Exception, GeneratorExit) as error:
            told = _told(error, context)
            failed = told.reason
            await self._abort(call, told, context, sender)
        finally:
            leave_context(token)
            del self._running[key]
            _count(running, time.monotonic() - started, failed)
            self._meter.ended(failed=failed not in ("", RequestCancelledError.reason))
            logger.debug(
                "%s ended after %.3f s", method, time.monotonic() - started, extra={"request_id": context.id()}
            )
            if not self._running:
                await asyncio.shield(self._on_empty())  # a drain may be waiting for it

    async def _run(self, running: Running, work: Work) -> None:
        """Run the handler to its end, or to its end after a cancel."""

        async def run() -> None:
            await work(running)
            await running.sender.finish()

        task = running.task = asyncio.get_running_loop().create_task(run())
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:  # the call's: nobody hears what still comes
            running.sender.close()
            running.context.kill()
            task.cancel()
            await self._until_ended(running, task)
            raise
        if running.ended_by is not None:
            await self._until_ended(running, task)
            raise running.ended_by
        task.result()

    async def _until_ended(self, running: Running, task: asyncio.Task[None]) -> None:
        """After a cancel: wait for the handler and for what the engine does about it, and measure."""
        killed_at = running.context.killed_at
        task.add_done_callback(functools.partial(_log_late, running))
        ended = asyncio.gather(task, running.context.settle(), return_exceptions=True)
        try:
            done, _ = await asyncio.wait((ended,), timeout=_STUBBORN_S)
            if not done:
                name = running.served.handler.name if running.served else "a handler"
                logger.warning(
                    "handler %s goes on %.0f s after its request was cancelled: let CancelledError pass",
                    name,
                    _STUBBORN_S,
                    extra={"request_id": running.context.id()},
                )
                await asyncio.wait((ended,))
        finally:
            if (metrics := running.metrics) is not None and killed_at is not None:
                metrics.cancel_to_stop.observe(time.monotonic() - killed_at)
                metrics.tokens_after_cancel.inc(running.sender.num_unwanted)

    def hand_over(self, which: Callable[[Running], bool], why: str) -> int:
        """End requests so that their clients take them elsewhere; gives how many."""
        chosen = [running for running in self if running.ended_by is None and which(running)]
        for running in chosen:
            if (metrics := running.metrics) is not None:
                metrics.handed_over.inc()
            running.end(EngineShutdown(f"{why}: take the request elsewhere"))
        return len(chosen)

    async def _abort(self, call: Call, error: MeshError, context: Context, sender: Sender | None = None) -> NoReturn:
        """End a call with an error and the request id, after what was sent."""
        if sender is not None:
            await sender.finish()
        # abort replaces the trailers that were set before: they are all given here
        await abort(call, error, self._trailers(context, sender.num_by_lane if sender else 0))

    def _trailers(self, context: Context, num_by_lane: int) -> tuple[tuple[str, str | bytes], ...]:
        """What every call ends with."""
        counted = ((NUM_BY_LANE, str(num_by_lane)),) if num_by_lane else ()
        return ((REQUEST_ID, printable(context.id())), *counted, *self._meter.trailers())

    def _lane_of(self, metadata: Mapping[str, str]) -> tuple[Lane | None, int]:
        """The lane that a call names for its outputs, and its number there; none if it names none rightly."""
        number = metadata.get(DELIVERY_ID, "")
        if not number.isdigit() or len(number) > 19:
            return None, 0
        return self.lanes.get(metadata.get(DELIVERY, "")), int(number)


def _count(running: Running, took_s: float, failed: str) -> None:
    """A request has ended.

    Args:
        failed: the reason of its error, if it has one.
    """
    if (metrics := running.metrics) is None:
        return
    metrics.requests.inc()
    metrics.duration.observe(took_s)
    metrics.output_tokens.inc(running.num_tokens)
    if failed == RequestCancelledError.reason:
        metrics.cancellations.inc()
    elif failed:
        metrics.failed(failed)


def _seconds(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None


def _log_late(running: Running, task: asyncio.Task[None]) -> None:
    """What a handler raised after its cancel: nobody else hears of it."""
    if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, MeshError):
        ids = {"request_id": running.context.id()}
        logger.warning("request %s failed after its cancel", running.context.id(), exc_info=error, extra=ids)


def _told(error: BaseException, context: Context) -> MeshError:
    """What the client is told of a handler's exception; what it isn't told goes to the log."""
    told, is_unexpected = from_exception(error)
    ids = {"request_id": context.id(), "error_id": told.error_id}
    if is_unexpected:
        logger.error("request %s failed, error id %s", context.id(), told.error_id, exc_info=error, extra=ids)
    elif isinstance(error, HandlerOutputError):
        logger.error("request %s: %s", context.id(), error, extra=ids)
    elif not isinstance(error, (MeshError, GeneratorExit)):
        # told to the client as its own mistake; whether it is one, only this line can show
        logger.warning("request %s was refused by its handler", context.id(), exc_info=error, extra=ids)
    return told
