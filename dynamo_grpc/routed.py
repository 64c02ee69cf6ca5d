"""One request at one of several instances: choose, open, and go elsewhere if that fails before the first output."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from typing import Generic

from dynamo_grpc.closing import AsyncClosing
from dynamo_grpc.context import Context
from dynamo_grpc.delivery import Delivery, M, OutputStream
from dynamo_grpc.errors import InvalidRequestError, MeshError, NoInstancesError, Retry, WrongInstanceError, names
from dynamo_grpc.inbox import Sink
from dynamo_grpc.instances import InstanceSet, Live
from dynamo_grpc.routing import Policy, RouterMode, make_policy
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2, model_card_pb2

#: How many instances a request is tried at before its first output.
MAX_ATTEMPTS = 4


class RoutedStream(AsyncClosing, Generic[M]):
    """The outputs of one request, wherever it runs; use it with `async with`, or read it to its end.

    Args:
        open_at: opens the request at an instance.
        choose: picks an instance that is not excluded, or raises.
        choose_later: the same, after a failure; it may wait for one.
        mark_gone: is told of instances whose address belongs to another process.

    Attributes:
        instance: who serves it now.
    """

    def __init__(
        self,
        open_at: Callable[[Live], OutputStream[M]],
        choose: Callable[[frozenset[int]], Live],
        choose_later: Callable[[frozenset[int]], Awaitable[Live]],
        mark_gone: Callable[[int], None],
    ) -> None:
        self._open_at: Callable[[Live], OutputStream[M]] = open_at
        self._choose_later, self._mark_gone = choose_later, mark_gone
        self._failed: set[int] = set()
        self._stream: OutputStream[M] = open_at(choose(frozenset()))

    @property
    def instance(self) -> model_card_pb2.Instance:
        """Who serves it now."""
        return self._stream.instance

    async def read(self, sink: Sink) -> bool:
        """Give outputs to `sink` as they arrive, until it returns False; True says that the stream has ended.

        `sink` is called from wherever outputs arrive, so it must not wait for anything. An int is one more token of a
        model's choice 0, and nothing else.

        Raises:
            MeshError: it has failed, and can't go elsewhere. What `sink` raises comes out as it is.
        """
        while True:
            try:
                return await self._stream.read(sink)
            except MeshError as error:
                await self._go_elsewhere(error)

    async def take(self) -> list[M | int]:
        """All outputs that are there; waits for one. None at all says that the stream has ended."""
        taken: list[M | int] = []

        def keep(outputs: list[M | int]) -> bool:
            taken.extend(outputs)
            return False

        await self.read(keep)
        return taken

    async def _go_elsewhere(self, error: MeshError) -> None:
        if self._stream.has_output or error.retry not in (Retry.ELSEWHERE, Retry.MIGRATE):
            raise error
        self._failed.add(self.instance.instance_id)
        if isinstance(error, WrongInstanceError):
            self._mark_gone(self.instance.instance_id)
        if len(self._failed) >= MAX_ATTEMPTS:
            raise error
        try:
            live = await self._choose_later(frozenset(self._failed))
        except MeshError:
            raise error from None
        self._stream = self._open_at(live)

    async def aclose(self) -> None:
        """Leave the stream: the worker is told."""
        await self._stream.aclose()


class Router:
    """Sends requests to the instances of a set.

    Args:
        describe: what the set is, for the error when it is empty.
        wait_s: how long a request that failed before its first output waits for another instance.
    """

    def __init__(
        self,
        instances: InstanceSet,
        delivery: Delivery,
        describe: str,
        wait_s: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
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
    ) -> RoutedStream[inference_pb2.GenerateResponse]:
        """Send a request to a model."""
        return RoutedStream(
            lambda live: self._delivery.open_generate(live, request, context),
            lambda excluded: self.choose(mode, instance_id, excluded),
            lambda excluded: self._choose_later(mode, instance_id, excluded),
            self.instances.mark_gone,
        )

    def call(
        self, request: endpoint_pb2.CallRequest, context: Context, mode: RouterMode, instance_id: int | None = None
    ) -> RoutedStream[endpoint_pb2.CallResponse]:
        """Send a request to an endpoint of any kind."""
        return RoutedStream(
            lambda live: self._delivery.open_call(live, request, context),
            lambda excluded: self.choose(mode, instance_id, excluded),
            lambda excluded: self._choose_later(mode, instance_id, excluded),
            self.instances.mark_gone,
        )
