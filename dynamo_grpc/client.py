"""A client of one endpoint: it watches the instances, routes, streams, cancels.

A request whose attempt fails before its first output goes to another instance: nothing was sent to anybody yet. A
model's answer whose instance is lost goes on at another one.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from dynamo_grpc.closing import AsyncClosing
from dynamo_grpc.connections import Connections
from dynamo_grpc.context import Context, current_context
from dynamo_grpc.delivery import Delivery
from dynamo_grpc.errors import (
    InvalidRequestError,
    NoInstancesError,
    RegistryError,
    names,
)
from dynamo_grpc.instances import InstanceSet, ask_whether_it_serves
from dynamo_grpc.messages import from_dict, from_value, to_value
from dynamo_grpc.names import INSTANCES, MODELS, EndpointName, nearest
from dynamo_grpc.records import decode_card, decode_instance, endpoint_of, read_instances
from dynamo_grpc.registry import Registry, View
from dynamo_grpc.routed import RoutedStream
from dynamo_grpc.router import Router
from dynamo_grpc.routing import RouterMode
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2, model_card_pb2

_REGISTRY_S = 10.0
#: A registry that didn't say what a card's limit is is asked again after this long.
_ASK_LIMIT_S = 10.0
_REASONS = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_TOOL_CALLS: "tool_calls",
    inference_pb2.FINISH_REASON_CONTENT_FILTER: "content_filter",
    inference_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


class Annotated:
    """One item of a stream."""

    __slots__ = ("_data",)

    def __init__(self, data: Any) -> None:
        self._data = data

    def data(self) -> Any:
        """What the handler yielded: a JSON value or bytes; a dict for a model's output."""
        return self._data

    def event(self) -> str | None:
        """Name of the event, for items that are no data; none are sent now."""
        return None

    def comments(self) -> list[str]:
        """Comments on the item; none are sent now."""
        return []

    def is_error(self) -> bool:
        """Always False: errors are raised."""
        return False

    def __repr__(self) -> str:
        return f"Annotated({self._data!r})"


class ResponseStream(AsyncClosing):
    """What `Client.generate` returns: an async iterator of items."""

    def __init__(self, stream: RoutedStream[Any, Any], *, annotated: bool) -> None:
        self._stream, self._annotated = stream, annotated
        self._pending: collections.deque[Any] = collections.deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        while not self._pending:
            messages = await self._stream.take()
            if not messages:
                raise StopAsyncIteration
            for message in messages:
                self._pending.extend(_values(message))
        value = self._pending.popleft()
        return Annotated(value) if self._annotated else value

    async def aclose(self) -> None:
        """Leave the stream: the worker is told."""
        await self._stream.aclose()


def _values(
    message: inference_pb2.GenerateResponse | endpoint_pb2.CallResponse | inference_pb2.EmbedResponse | int,
) -> Iterator[Any]:
    if isinstance(message, int):
        yield {"token_ids": [message], "index": 0}
        return
    if isinstance(message, inference_pb2.EmbedResponse):
        yield from (list(vector.values) for vector in message.embeddings)
        return
    if isinstance(message, endpoint_pb2.CallResponse):
        yield message.data if message.WhichOneof("payload") == "data" else from_value(message.json)
        return
    for position, delta in enumerate(message.choices):
        item: dict[str, Any] = {"token_ids": list(delta.token_ids), "index": delta.index}
        if delta.HasField("text"):
            item["text"] = delta.text
        if delta.HasField("logprobs"):
            item["log_probs"] = list(delta.logprobs.token_logprobs)
        if delta.HasField("finish"):
            item["finish_reason"] = _REASONS.get(delta.finish.reason, "stop")
        if message.HasField("usage") and position == len(message.choices) - 1:
            prompt, completion = message.usage.prompt_tokens, message.usage.completion_tokens
            item["completion_usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }
        yield item


class Client:
    """A client of one endpoint; `await endpoint.client()` makes it.

    A request is a JSON value or bytes; for an endpoint that serves a model a dict of PreprocessedRequest's fields, a
    list of token ids, or the message itself. An EmbedRequest is answered by a vector for each of its inputs.
    """

    def __init__(
        self,
        name: EndpointName,
        registry: Registry,
        connections: Connections,
        delivery: Delivery,
        router_mode: RouterMode = RouterMode.RoundRobin,
    ) -> None:
        self.name = name
        self._registry = registry
        self._mode = router_mode
        self._is_closed = False
        self._view = View.start(registry, name.instances_prefix, decode_instance, ask_whether_it_serves(connections))
        self._instances = InstanceSet(self._view, connections)
        self._router = Router(self._instances, delivery, f"endpoint {name}")
        self._limits: dict[str, int | None] = {}
        self._ask_limit_at = 0.0

    def instance_ids(self) -> list[int]:
        """Ids of the instances that can be called now."""
        return [live.instance_id for live in self._instances.routable()]

    def instances(self) -> list[model_card_pb2.Instance]:
        """All instances that the registry lists."""
        return [live.instance for live in self._instances.all()]

    async def wait_for_instances(self, timeout_s: float | None = None) -> list[int]:
        """Wait until at least one instance can be called; returns their ids.

        Raises:
            NoInstancesError: none within `timeout_s`; says what the registry has.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._view.wait_ready()
                while not self.instance_ids():
                    await self._instances.wait_changed()
        except TimeoutError:
            raise NoInstancesError(
                f"no instance of {self.name} within {timeout_s:g} s: {await self._what_there_is()}"
            ) from None
        return self.instance_ids()

    async def _what_there_is(self) -> str:
        try:
            entries = await self._registry.list(INSTANCES, timeout_s=2.0)
        except RegistryError as error:
            return error.message
        known = sorted({endpoint_of(record.instance) for record in read_instances(entries)})
        hint = nearest(str(self.name), known)
        return f"{self._registry.description} lists {names(known)}" + (
            f" (did you mean {hint!r}?)" if hint and hint != str(self.name) else ""
        )

    async def generate(
        self, request: Any = None, annotated: bool = True, context: Context | None = None
    ) -> ResponseStream:
        """Send a request to an instance that the client's router mode picks.

        The context is that of the request being handled, if there is one and no other is given: stopping or killing it
        does the same here.

        Raises:
            NoInstancesError: nobody serves the endpoint; names what there is.
            InvalidRequestError: the request can't be sent to such an endpoint.
            Errors of the worker are raised by the stream.
        """
        return await self._send(request, self._mode, None, annotated, context)

    async def round_robin(
        self, request: Any = None, annotated: bool = True, context: Context | None = None
    ) -> ResponseStream:
        """As `generate`, each instance in turn."""
        return await self._send(request, RouterMode.RoundRobin, None, annotated, context)

    async def random(
        self, request: Any = None, annotated: bool = True, context: Context | None = None
    ) -> ResponseStream:
        """As `generate`, any instance."""
        return await self._send(request, RouterMode.Random, None, annotated, context)

    async def direct(
        self, request: Any, instance_id: int, annotated: bool = True, context: Context | None = None
    ) -> ResponseStream:
        """As `generate`, exactly this instance; never tried elsewhere."""
        return await self._send(request, RouterMode.Direct, instance_id, annotated, context)

    async def _send(
        self, request: Any, mode: RouterMode, instance_id: int | None, annotated: bool, context: Context | None
    ) -> ResponseStream:
        context = context or current_context() or Context()
        try:
            async with asyncio.timeout(_REGISTRY_S):
                await self._view.wait_ready()
        except TimeoutError:
            raise self._registry.no_answer() from None
        listed = self._instances.all()
        if not listed:
            raise NoInstancesError(
                f"no instances found for endpoint {self.name}: {await self._what_there_is()}", retry_after_s=1.0
            )
        stream: RoutedStream[Any, Any]
        if isinstance(request, inference_pb2.EmbedRequest):
            stream = self._router.embed(request, context, mode, instance_id)
        elif listed[0].instance.kind == model_card_pb2.ENDPOINT_KIND_MODEL:
            message = to_preprocessed_request(request)
            limit = await self._migration_limit(listed[0].instance)
            stream = self._router.generate(message, context, mode, instance_id, limit)
        else:
            call = endpoint_pb2.CallRequest(endpoint=str(self.name))
            if isinstance(request, (bytes, bytearray)):
                call.data = bytes(request)
            else:
                try:
                    call.json.CopyFrom(to_value(request))
                except TypeError as error:
                    raise InvalidRequestError(f"the request is no JSON value: {error}") from None
            stream = self._router.call(call, context, mode, instance_id)
        return ResponseStream(stream, annotated=annotated)

    async def _migration_limit(self, instance: model_card_pb2.Instance) -> int | None:
        """How often the model's card lets an answer go on elsewhere; None if it doesn't say, or can't be read now."""
        checksum = instance.card_checksum
        if checksum not in self._limits and time.monotonic() >= self._ask_limit_at:
            try:
                entries = await self._registry.list(f"{MODELS}{self.name.namespace}/", timeout_s=2.0)
            except RegistryError:  # requests go on while it doesn't answer: they don't wait for it one by one
                self._ask_limit_at = time.monotonic() + _ASK_LIMIT_S
                return None
            cards = [card for entry in entries if (card := decode_card(entry)) and card.checksum == checksum]
            has_limit = bool(cards) and cards[0].HasField("migration_limit")
            self._limits[checksum] = cards[0].migration_limit if has_limit else None
        return self._limits.get(checksum)

    async def close(self) -> None:
        """Stop watching. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._instances.close()
            await self._view.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def to_preprocessed_request(request: Any) -> inference_pb2.PreprocessedRequest:
    """A request to a model as a message.

    Raises:
        InvalidRequestError: it can't be one.
    """
    match request:
        case inference_pb2.PreprocessedRequest():
            return request
        case Mapping():
            return from_dict(request, inference_pb2.PreprocessedRequest())
        case str():
            return inference_pb2.PreprocessedRequest(text=request)
        case Sequence() if all(type(token_id) is int and 0 <= token_id < 2**32 for token_id in request):
            return inference_pb2.PreprocessedRequest(token_ids=request)
    raise InvalidRequestError(f"a model takes a dict, a list of token ids or text, not {type(request).__name__}")
