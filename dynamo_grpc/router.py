"""From a request to the instance that takes it: a policy over those that are up, answer and have room."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Sequence

from dynamo_grpc.context import Context
from dynamo_grpc.delivery import Delivery
from dynamo_grpc.errors import InvalidRequestError, NoInstancesError, OverloadedError, names
from dynamo_grpc.instances import FULL_S, InstanceSet, Live
from dynamo_grpc.migration import MIGRATION_LIMIT, Answer
from dynamo_grpc.routed import Route, RoutedStream
from dynamo_grpc.routing import Policy, RouterMode, make_policy
from dynamo_grpc.routing.budget import RetryBudget
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2

#: Full names of the methods, as traces have them.
GENERATE, EMBED = "dynamo_grpc.v1.Inference/Generate", "dynamo_grpc.v1.Inference/Embed"
CALL = "dynamo_grpc.v1.Endpoint/Call"

#: The pause before the second retry; it doubles with each one, and a part of it is by chance.
_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class Router:
    """Sends requests to the instances of a set.

    Args:
        describe: what the set is, for the error when it is empty.
        wait_s: how long a request that failed waits for another instance.
        first_output_s: how long an instance may take to its first output; None is without limit.
        output_gap_s: the same between outputs.
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
        first_output_s: float | None = None,
        output_gap_s: float | None = None,
    ) -> None:
        self.migration_limit, self.first_output_s, self.output_gap_s = migration_limit, first_output_s, output_gap_s
        self.budget = RetryBudget()
        self.instances, self._delivery, self._describe, self._wait_s = instances, delivery, describe, wait_s
        self._rng = rng or random.Random()
        self._policies: dict[RouterMode, Policy | None] = {}

    def _policy(self, mode: RouterMode) -> Policy | None:
        if mode not in self._policies:
            self._policies[mode] = make_policy(mode, self._rng)
        return self._policies[mode]

    def choose(
        self, mode: RouterMode, instance_id: int | None, excluded: frozenset[int], *, has_begun: bool = False
    ) -> Live:
        """Pick an instance.

        Args:
            has_begun: its client has a part of the answer: thresholds don't hold for it.

        Raises:
            NoInstancesError: there is none left.
            OverloadedError: none of them has room.
            InvalidRequestError: direct mode without an instance id.
        """
        if instance_id is not None:
            live = self.instances.get(instance_id)
            if live is None or instance_id in excluded:
                known = [f"{other.instance_id:016x}" for other in self.instances.all()]
                text = f"instance_id={instance_id} not found for {self._describe}"
                raise NoInstancesError(f"{text}: {instance_id:016x} is none of {names(known)}")
            return live
        policy = self._policy(mode)
        if policy is None:
            raise InvalidRequestError("router mode direct needs an instance id", param="instance_id")
        routable = self.instances.routable(excluded)
        if not routable:
            down = len(self.instances.all()) - len(excluded)
            state = f"{down} listed, none of them answers" if down > 0 and not excluded else "none is registered"
            raise NoInstancesError(f"no instances found for {self._describe}: {state}", retry_after_s=1.0)
        return policy.choose(self.instances.with_room(routable, ignores_thresholds=has_begun))

    def scores(self, mode: RouterMode, candidates: Sequence[Live]) -> Sequence[float]:
        """What a policy would go by now; 0 for all where the client names the instance."""
        policy = self._policy(mode)
        return policy.scores(candidates) if policy is not None and candidates else [0.0] * len(candidates)

    def check_room(self) -> None:
        """Refuse at once what would be refused anyway, before it costs anything.

        Raises:
            OverloadedError: all instances are known to be full or busy.
        """
        self.instances.with_room(self.instances.routable())

    async def choose_later(
        self,
        mode: RouterMode,
        instance_id: int | None,
        excluded: frozenset[int],
        num_pauses: int = 0,
        *,
        has_begun: bool = False,
    ) -> Live:
        """Pick an instance after a failure; while there is none, or none has room, wait for one.

        Raises:
            NoInstancesError, OverloadedError: as `choose`, when the wait is over.
        """
        end = time.monotonic() + self._wait_s
        if num_pauses:
            pause_s = min(_PAUSE_S * 2 ** (num_pauses - 1), _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s * self._rng.uniform(0.5, 1.0))
        while True:
            try:
                return self.choose(mode, instance_id, excluded, has_begun=has_begun)
            except (NoInstancesError, OverloadedError) as error:
                if instance_id is not None or (left_s := end - time.monotonic()) <= 0:
                    raise
                if isinstance(error, OverloadedError):
                    left_s = min(left_s, FULL_S * self._rng.uniform(0.5, 1.5))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self.instances.wait_changed()

    def _route(self, mode: RouterMode, instance_id: int | None) -> Route:
        return Route(
            self.instances,
            self.budget,
            lambda excluded: self.choose(mode, instance_id, excluded),
            lambda excluded, num_pauses, has_begun: self.choose_later(
                mode, instance_id, excluded, num_pauses, has_begun=has_begun
            ),
            self.first_output_s,
            self.output_gap_s,
        )

    def generate(
        self,
        request: inference_pb2.PreprocessedRequest,
        context: Context,
        mode: RouterMode,
        instance_id: int | None = None,
        migration_limit: int | None = None,
    ) -> RoutedStream[inference_pb2.PreprocessedRequest, inference_pb2.GenerateResponse]:
        """Send a request to a model.

        Raises:
            NoInstancesError, OverloadedError: as `choose`.
        """
        return RoutedStream(
            request,
            context,
            lambda live, message: self._delivery.open_generate(live, message, context, self.first_output_s),
            self._route(mode, instance_id),
            Answer(request, self.migration_limit if migration_limit is None else migration_limit),
            method=GENERATE,
        )

    def call(
        self, request: endpoint_pb2.CallRequest, context: Context, mode: RouterMode, instance_id: int | None = None
    ) -> RoutedStream[endpoint_pb2.CallRequest, endpoint_pb2.CallResponse]:
        """Send a request to an endpoint of any kind.

        Raises:
            NoInstancesError, OverloadedError: as `choose`.
        """
        return RoutedStream(
            request,
            context,
            lambda live, message: self._delivery.open_call(live, message, context),
            self._route(mode, instance_id),
            method=CALL,
        )

    def embed(
        self, request: inference_pb2.EmbedRequest, context: Context, mode: RouterMode, instance_id: int | None = None
    ) -> RoutedStream[inference_pb2.EmbedRequest, inference_pb2.EmbedResponse]:
        """Send a request to a model that makes vectors; the stream has one answer.

        Raises:
            NoInstancesError, OverloadedError: as `choose`.
        """
        return RoutedStream(
            request,
            context,
            lambda live, message: self._delivery.open_embed(live, message, context, self.first_output_s),
            self._route(mode, instance_id),
            method=EMBED,
        )
