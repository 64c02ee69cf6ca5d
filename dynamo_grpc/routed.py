"""One request at one of several instances: choose, open, and go elsewhere if that fails before the first output."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from dynamo_grpc.closing import AsyncClosing
from dynamo_grpc.context import Context
from dynamo_grpc.delivery import Delivery, M, OutputStream
from dynamo_grpc.errors import (
    InvalidRequestError,
    MeshError,
    NoInstancesError,
    RequestCancelledError,
    Retry,
    WrongInstanceError,
    names,
)
from dynamo_grpc.inbox import Sink
from dynamo_grpc.instances import InstanceSet, Live
from dynamo_grpc.migration import MIGRATION_LIMIT, Answer
from dynamo_grpc.routing import Policy, RouterMode, make_policy
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2, model_card_pb2

logger = logging.getLogger(__name__)

R = TypeVar("R", inference_pb2.PreprocessedRequest, endpoint_pb2.CallRequest)

#: How many instances a request is tried at before its first output, and again when it goes on elsewhere.
MAX_ATTEMPTS = 4


class RoutedStream(AsyncClosing, Generic[R, M]):
    """The outputs of one request, wherever it runs; use it with `async with`, or read it to its end.

    Args:
        request: what is sent.
        context: the request's own; a stop or a kill ends the search for an instance too.
        open_at: opens a request at an instance.
        choose: picks an instance that is not excluded, or raises.
        choose_later: the same, after a failure; it may wait for one.
        mark_gone: is told of instances whose address belongs to another process.
        answer: for a model's request: what it gave, so that it can go on elsewhere after its first output.

    Attributes:
        num_retries: how often it was sent to another instance because nothing had been given yet.
    """

    def __init__(
        self,
        request: R,
        context: Context,
        open_at: Callable[[Live, R], OutputStream[M]],
        choose: Callable[[frozenset[int]], Live],
        choose_later: Callable[[frozenset[int]], Awaitable[Live]],
        mark_gone: Callable[[int], None],
        answer: Answer | None = None,
    ) -> None:
        self._request: R = request
        self._open_at: Callable[[Live, R], OutputStream[M]] = open_at
        self._context, self._choose_later, self._mark_gone, self._answer = context, choose_later, mark_gone, answer
        self._failed: set[int] = set()
        self._num_attempts = 1
        self._error: MeshError | None = None
        self._is_closed = self._is_whole = False
        self.num_retries = 0
        self._stream: OutputStream[M] = open_at(choose(frozenset()), request)

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
        if (answer := self._answer) is None:
            keep = sink
        else:

            def keep(outputs: list[Any]) -> bool:
                answer.add(outputs)
                return sink(outputs)

        while True:
            try:
                return await self._stream.read(keep)
            except MeshError as error:
                if error is not self._stream.error:
                    raise  # the sink's own
                self._error = error
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
        if self._stream.has_output:
            if answer is None or error.retry is not Retry.MIGRATE:
                raise error
            if refusal := answer.refusal:
                error.say_more(f"it can't go on elsewhere: {refusal}")
                raise error
            self._num_attempts = 0
        elif error.retry not in (Retry.ELSEWHERE, Retry.MIGRATE) and not (answer and error.retry is Retry.LATER):
            raise error  # (an answer that has begun looks for room elsewhere too)
        self._failed.add(self.instance.instance_id)
        if isinstance(error, WrongInstanceError):
            self._mark_gone(self.instance.instance_id)
        if self._num_attempts >= MAX_ATTEMPTS:
            raise error
        live = await self._wait_for_another(error)
        self._num_attempts += 1
        if answer is None:
            self.num_retries += 1
        elif self._stream.has_output:
            self._request = answer.resumed(self.instance.card_checksum)  # type: ignore[assignment]  # a model's request
            answer.num_migrations += 1
            logger.info("a request goes on elsewhere: %s", error.message, extra={"request_id": self._context.id()})
        self._stream = self._open_at(live, self._request)

    async def _wait_for_another(self, error: MeshError) -> Live:
        """An instance that it hasn't failed at; the end of the request ends the wait."""
        waiting = asyncio.ensure_future(self._choose_later(frozenset(self._failed)))
        ended = self._context.async_killed_or_stopped()
        try:
            await asyncio.wait((waiting, ended), return_when=asyncio.FIRST_COMPLETED)
            if self._is_closed or ended.done():
                raise RequestCancelledError(f"request {self._context.id()} was ended while it waited for an instance")
            return waiting.result()
        except NoInstancesError as none:
            error.say_more(f"nobody else can take it: {none.message}")
            raise error from None
        finally:
            waiting.cancel()
            ended.cancel()

    async def aclose(self) -> None:
        """Leave the stream: the worker is told."""
        self._is_closed = True
        await self._stream.aclose()


class Router:
    """Sends requests to the instances of a set.

    Args:
        describe: what the set is, for the error when it is empty.
        wait_s: how long a request that failed waits for another instance.
        migration_limit: how often a model's request goes on elsewhere after its first output.
    """

    def __init__(
        self,
        instances: InstanceSet,
        delivery: Delivery,
        describe: str,
        wait_s: float = 0.0,
        rng: random.Random | None = None,
        migration_limit: int = MIGRATION_LIMIT,
    ) -> None:
        self._migration_limit = migration_limit
        self.instances, self._delivery, self._describe, self._wait_s = instances, delivery, describe, wait_s
        self._rng = rng or random.Random()
        self._policies: dict[RouterMode, Policy | None] = {}

    def choose(self, mode: RouterMode, instance_id: int | None, excluded: frozenset[int]) -> Live:
        """Pick an instance.

        Raises:
            NoInstancesError: there is none left.
            InvalidRequestError: direct mode without an instance id.
        """
        if instance_id is not None:
            live = self.instances.get(instance_id)
            if live is None or instance_id in excluded:
                known = [str(other.instance_id) for other in self.instances.all()]
                raise NoInstancesError(
                    f"instance_id={instance_id} not found for {self._describe}: there are {names(known)}"
                )
            return live
        if mode not in self._policies:
            self._policies[mode] = make_policy(mode, self._rng)
        policy = self._policies[mode]
        if policy is None:
            raise InvalidRequestError("router mode direct needs an instance id", param="instance_id")
        routable = self.instances.routable(excluded)
        if not routable:
            down = len(self.instances.all()) - len(excluded)
            state = f"{down} listed, none of them answers" if down > 0 and not excluded else "none is registered"
            raise NoInstancesError(f"no instances found for {self._describe}: {state}", retry_after_s=1.0)
        return policy.choose(routable)

    async def _choose_later(self, mode: RouterMode, instance_id: int | None, excluded: frozenset[int]) -> Live:
        """Pick an instance after a failure; while there is none, wait for one."""
        end = time.monotonic() + self._wait_s
        while True:
            try:
                return self.choose(mode, instance_id, excluded)
            except NoInstancesError:
                if instance_id is not None or (left_s := end - time.monotonic()) <= 0:
                    raise
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self.instances.wait_changed()

    def generate(
        self,
        request: inference_pb2.PreprocessedRequest,
        context: Context,
        mode: RouterMode,
        instance_id: int | None = None,
    ) -> RoutedStream[inference_pb2.PreprocessedRequest, inference_pb2.GenerateResponse]:
        """Send a request to a model."""
        return RoutedStream(
            request,
            context,
            lambda live, message: self._delivery.open_generate(live, message, context),
            lambda excluded: self.choose(mode, instance_id, excluded),
            lambda excluded: self._choose_later(mode, instance_id, excluded),
            self.instances.mark_gone,
            Answer(request, self._migration_limit),
        )

    def call(
        self, request: endpoint_pb2.CallRequest, context: Context, mode: RouterMode, instance_id: int | None = None
    ) -> RoutedStream[endpoint_pb2.CallRequest, endpoint_pb2.CallResponse]:
        """Send a request to an endpoint of any kind."""
        return RoutedStream(
            request,
            context,
            lambda live, message: self._delivery.open_call(live, message, context),
            lambda excluded: self.choose(mode, instance_id, excluded),
            lambda excluded: self._choose_later(mode, instance_id, excluded),
            self.instances.mark_gone,
        )
