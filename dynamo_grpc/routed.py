"""One request at one of several instances: open it, and go elsewhere when that fails, also after its first output."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dynamo_grpc.closing import AsyncClosing
from dynamo_grpc.context import Context
from dynamo_grpc.delivery import M, OutputStream
from dynamo_grpc.errors import (
    CardMismatchError,
    DeadlineError,
    DrainingError,
    HandlerEndedError,
    HandlerOutputError,
    InstanceLostError,
    InternalError,
    MeshError,
    NoInstancesError,
    NotReadyError,
    OverloadedError,
    RequestCancelledError,
    ResponseTimeoutError,
    Retry,
    WrongInstanceError,
)
from dynamo_grpc.inbox import Sink
from dynamo_grpc.instances import InstanceSet, Live
from dynamo_grpc.migration import Answer
from dynamo_grpc.routing.budget import RetryBudget
from dynamo_grpc.semconv import FIRST_OUTPUT, MIGRATED, RETRIED
from dynamo_grpc.telemetry import Attempts
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2, model_card_pb2

_NO_SPAN = contextlib.nullcontext()

logger = logging.getLogger(__name__)

R = TypeVar("R", inference_pb2.PreprocessedRequest, endpoint_pb2.CallRequest, inference_pb2.EmbedRequest)

#: How many instances a request is tried at before its first output, and again when it goes on elsewhere.
MAX_ATTEMPTS = 4
#: How often an answer that has begun looks for room, with longer and longer pauses.
_MAX_PAUSES = 20
#: What speaks against an instance; other errors say nothing of it.
_FAILURES = (InternalError, HandlerOutputError, HandlerEndedError, ResponseTimeoutError, InstanceLostError)
#: The request was never begun: trying elsewhere costs little, and each instance refuses it once.
_REFUSALS = (CardMismatchError, DrainingError, NotReadyError, OverloadedError, WrongInstanceError)


@dataclass(frozen=True, slots=True)
class Route:
    """The way of one request.

    Attributes:
        choose: picks an instance that has room, without the excluded ones; raises NoInstancesError or OverloadedError.
        choose_later: the same after a failure: after a pause if there were some before, and it waits for one for a
            while. Takes the excluded ones, the number of pauses, and whether the answer has begun.
        first_output_s: how long an instance may take to its first output; None is without limit.
        output_gap_s: the same between outputs.
    """

    instances: InstanceSet
    budget: RetryBudget
    choose: Callable[[frozenset[int]], Live]
    choose_later: Callable[[frozenset[int], int, bool], Awaitable[Live]]
    first_output_s: float | None = None
    output_gap_s: float | None = None


class RoutedStream(AsyncClosing, Generic[R, M]):
    """The outputs of one request, wherever it runs; use it with `async with`, or read it to its end.

    Args:
        request: what is sent.
        context: the request's own; a stop or a kill ends the search for an instance too.
        open_at: opens a request at an instance.
        route: where it may go.
        answer: for a model's request: what it gave, so that it can go on elsewhere after its first output.
        method: the RPC, for traces.

    Attributes:
        num_retries: how often it was sent to another instance because nothing had been given yet.
        is_enough: its reader has all that it wants, and leaves it well.
    """

    def __init__(
        self,
        request: R,
        context: Context,
        open_at: Callable[[Live, R], OutputStream[M]],
        route: Route,
        answer: Answer | None = None,
        method: str = "",
    ) -> None:
        self._request: R = request
        self._open_at: Callable[[Live, R], OutputStream[M]] = open_at
        self._context, self._route, self._answer = context, route, answer
        self._failed: set[int] = set()
        self._full: set[int] = set()
        self._num_attempts = 1
        self._num_pauses = 0
        self._error: MeshError | None = None
        self._is_closed = self._is_whole = False
        self.num_retries = 0
        self.is_enough = False
        self._attempts = Attempts.begin(method)
        route.budget.request()
        self._open(route.choose(frozenset()))

    def _open(self, live: Live) -> None:
        self._live, self._has_answered, self._has_verdict = live, False, False
        self._was_try = self._route.instances.chosen(live)
        attempts = self._attempts
        with attempts.open(live.instance.address, f"{live.instance_id:016x}") if attempts else _NO_SPAN:
            self._stream: OutputStream[M] = self._open_at(live, self._request)
        self._stream.limit_silence(self._route.first_output_s, self._route.output_gap_s)

    def _verdict(self, error: MeshError | None = None, *, is_left: bool = False) -> None:
        """How the attempt ended, for the next requests."""
        if self._has_verdict:
            return
        self._has_verdict, instances, live = True, self._route.instances, self._live
        if self._attempts is not None:
            self._attempts.end(error or (RequestCancelledError("left") if is_left else None))
        is_well = None if is_left else True if error is None else _is_well(error)
        instances.ended(live, is_well=is_well, was_try=self._was_try, was_refused=isinstance(error, _REFUSALS))
        if isinstance(error, OverloadedError):
            instances.mark_full(live, error)
        elif isinstance(error, NotReadyError):
            instances.mark_not_ready(live)
        elif isinstance(error, (DrainingError, WrongInstanceError)):
            instances.mark_gone(live.instance_id)

    @property
    def instance(self) -> model_card_pb2.Instance:
        """Who serves it now."""
        return self._stream.instance

    @property
    def num_migrations(self) -> int:
        """How often it went on at another instance after its first output."""
        return self._answer.num_migrations if self._answer is not None else 0

    async def read(self, sink: Sink) -> bool:
        """Give outputs to `sink` as they arrive, until it returns False; True says that the stream has ended.

        `sink` is called from wherever outputs arrive, so it must not wait for anything. An int is one more token of a
        model's choice 0, and nothing else.

        Raises:
            MeshError: it has failed, and can't go elsewhere. What `sink` raises comes out as it is.
        """
        if self._is_whole:
            return True
        if self._error is not None:
            raise self._error
        answer = self._answer

        def keep(outputs: list[Any]) -> bool:
            if answer is not None:
                answer.add(outputs)
            if not self._has_answered:
                self._has_answered = True
                self._route.instances.answered(self._live)
                if self._attempts is not None:
                    self._attempts.event(FIRST_OUTPUT)
            return sink(outputs)

        while True:
            try:
                if not await self._stream.read(keep):
                    return False
                if answer is None or answer.is_finished:
                    self._verdict()
                    return True
                self._error = HandlerEndedError("the worker's stream ended without a finish reason")
            except asyncio.CancelledError:
                self._verdict(is_left=True)  # whoever read it will not close it
                raise
            except MeshError as error:
                if error is not self._stream.error:
                    raise  # the sink's own
                self._error = error
            self._verdict(self._error)
            if (ending := self._ending(self._error)) is not None:
                self._is_whole = True
                if ending.choices:
                    sink([ending])
                return True
            await self._go_elsewhere(self._error)
            self._error = None

    async def take(self) -> list[M | int]:
        """All outputs that are there; waits for one. None at all says that the stream has ended."""
        taken: list[M | int] = []

        def keep(outputs: list[M | int]) -> bool:
            taken.extend(outputs)
            return False

        await self.read(keep)
        return taken

    def _ending(self, error: MeshError) -> inference_pb2.GenerateResponse | None:
        """What is still to be told if the answer needs no other instance, though its own was lost."""
        if self._answer is None or not self._stream.has_output or error.retry is not Retry.MIGRATE:
            return None
        return self._answer.ending(is_stopped=self._context.is_stopped() and not self._context.is_killed())

    async def _go_elsewhere(self, error: MeshError) -> None:
        """Send the request to another instance: as it was, or so that it goes on where it was.

        Raises:
            MeshError: `error`, if that can't be or nobody is there; or it was cancelled meanwhile.
        """
        answer = self._answer if self._answer is not None and self._answer.has_begun else None
        is_full = isinstance(error, OverloadedError)
        if self._stream.has_output:
            if answer is None or error.retry is not Retry.MIGRATE:
                raise error
            if refusal := answer.refusal:
                error.say_more(f"it can't go on elsewhere: {refusal}")
                raise error
            self._num_attempts = 0
            self._failed.clear()
        elif error.retry is Retry.NEVER or (error.retry is Retry.LATER and not is_full and answer is None):
            raise error  # (an answer that has begun looks further whatever it is)
        if not isinstance(error, _REFUSALS):  # each instance refuses a request once
            self._num_attempts += 1
            if self._num_attempts > MAX_ATTEMPTS:
                raise error
        if answer is None or not is_full:
            (self._full if is_full else self._failed).add(self.instance.instance_id)
        if isinstance(error, HandlerEndedError) and not self._route.budget.spend():
            error.say_more("it is not tried again: too many requests are")
            raise error
        if is_full and answer is None:
            live = self._choose_with_room(error)
        else:
            live = await self._wait_for_another(error)
        if self._attempts is not None:
            self._attempts.parent_event(MIGRATED if self._stream.has_output else RETRIED, error.message)
        if answer is None:
            self.num_retries += 1
        elif self._stream.has_output:
            self._request = answer.resumed(self.instance.card_checksum)  # type: ignore[assignment]  # a model's request
            answer.num_migrations += 1
            logger.info("a request goes on elsewhere: %s", error.message, extra={"request_id": self._context.id()})
        self._open(live)

    def _choose_with_room(self, error: MeshError) -> Live:
        """Another instance than those that were full; nobody waits for one."""
        try:
            return self._route.choose(frozenset(self._failed | self._full))
        except OverloadedError as none:
            raise none from error
        except NoInstancesError:
            raise error from None

    async def _wait_for_another(self, error: MeshError) -> Live:
        """An instance that it hasn't failed at; the end of the request ends the wait."""
        has_begun = self._answer is not None and self._answer.has_begun
        if has_begun and isinstance(error, OverloadedError):
            self._num_pauses += 1
            if self._num_pauses > _MAX_PAUSES:
                raise error
        num_pauses = max(self._num_attempts - 2, self._num_pauses)
        later = self._route.choose_later(frozenset(self._failed), num_pauses, has_begun)
        waiting = asyncio.ensure_future(later)
        ended = self._context.async_killed_or_stopped()
        try:
            left_s = self._context.remaining_s()
            done, _ = await asyncio.wait((waiting, ended), timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineError(f"request {self._context.id()} took longer than its time-out ({error.message})")
            if self._is_closed or ended.done():
                raise RequestCancelledError(f"request {self._context.id()} was ended while it waited for an instance")
            return waiting.result()
        except (NoInstancesError, OverloadedError) as none:
            error.say_more(f"nobody else can take it: {none.message}")
            raise error from None
        finally:
            waiting.cancel()
            ended.cancel()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # one that was never opened, or whose event loop has ended
            self._verdict(is_left=True)

    async def aclose(self) -> None:
        """Leave the stream: the worker is told."""
        self._is_closed = True
        self._verdict(is_left=not self.is_enough)
        await self._stream.aclose()


def _is_well(error: MeshError) -> bool | None:
    """What an error says of the instance that it comes from; refusals of what the client did say nothing."""
    return False if isinstance(error, _FAILURES) else None
