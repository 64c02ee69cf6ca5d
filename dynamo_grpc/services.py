"""Inference and Endpoint over the endpoints of a server: each request goes through `Requests.serve`.

A stream is written with `context.write` from inside the task that reads the handler, so that a cancel always lands
where the handler can be closed.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import FrameType
from typing import TYPE_CHECKING, Any

from dynamo_grpc.embedding import Vectors
from dynamo_grpc.errors import (
    CardMismatchError,
    EndpointNotFoundError,
    HandlerOutputError,
    InvalidRequestError,
    NotReadyError,
    RequestCancelledError,
    UnsupportedError,
)
from dynamo_grpc.generation import Generation
from dynamo_grpc.lane import Lane, Sender, token_response
from dynamo_grpc.messages import from_value, to_dict, to_value
from dynamo_grpc.requests import Running
from dynamo_grpc.status import abort
from dynamo_grpc.turn import Turn
from dynamo_grpc.v1 import endpoint_pb2, endpoint_pb2_grpc, inference_pb2, inference_pb2_grpc, model_card_pb2
from dynamo_grpc.validation import check_embed, check_request, makes_vectors_alone, with_defaults

if TYPE_CHECKING:
    from dynamo_grpc.server import Served, Server

INFERENCE = "dynamo_grpc.v1.Inference"
ENDPOINT = "dynamo_grpc.v1.Endpoint"
CONTROL = "dynamo_grpc.v1.Control"
_GENERATE = f"{INFERENCE}/Generate"


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Generate and GenerateOnce over a server's models."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def Generate(self, request: inference_pb2.PreprocessedRequest, context: Any) -> None:  # type: ignore[override]
        await self._server.requests.serve(
            context, _GENERATE, request.request_id, lambda running: self._generate(request, running, running.sender)
        )

    async def GenerateOnce(self, request: inference_pb2.PreprocessedRequest, context: Any) -> Any:
        folded: Folded | None = None

        async def work(running: Running) -> None:
            nonlocal folded
            folded = Folded(running.sender)
            await self._generate(request, running, folded)

        await self._server.requests.serve(context, f"{_GENERATE}Once", request.request_id, work)
        assert folded is not None
        return folded.response

    async def Deliver(self, request: inference_pb2.DeliverRequest, context: Any) -> None:  # type: ignore[override]
        lane = Lane()
        lanes = self._server.requests.lanes
        if not request.delivery or request.delivery in lanes:
            await abort(context, InvalidRequestError("a delivery needs a name that no other one has", param="delivery"))
        lanes[request.delivery] = lane
        try:
            await lane.run(context)
        finally:
            del lanes[request.delivery]

    async def Embed(self, request: inference_pb2.EmbedRequest, context: Any) -> Any:
        answers: list[inference_pb2.EmbedResponse] = []

        async def work(running: Running) -> None:
            answers.append(await self._embed(request, running))

        await self._server.requests.serve(context, f"{INFERENCE}/Embed", request.request_id, work)
        return answers[0]

    async def _embed(self, request: inference_pb2.EmbedRequest, running: Running) -> inference_pb2.EmbedResponse:
        served, card = self._begin(request.model, running)
        if model_card_pb2.MODEL_TYPE_EMBEDDING not in card.model_types:
            raise UnsupportedError(f"model {card.name!r} makes no embeddings", param="model")
        check_embed(request, card)
        given = inference_pb2.EmbedRequest()
        given.CopyFrom(request)
        given.model, given.request_id = card.name, running.context.id()
        vectors = Vectors(served.handler.name, given)
        async with Turn(served, running, request.priority) as turn:
            if not turn.has_come:
                raise RequestCancelledError("the request was stopped while it waited for its turn")
            stream = served.handler(to_dict(given) if served.gives_dicts else given, running.context)
            async with contextlib.aclosing(stream) as items:
                async for item in items:
                    if not turn.has_output:
                        turn.output()
                    await vectors.feed(item)
        return vectors.response()

    def _begin(self, model: str, running: Running) -> tuple[Served, model_card_pb2.ModelCard]:
        """Whose request it is.

        Raises:
            MeshError: it can't be taken now.
        """
        served = running.served = self._server.model(model)
        assert served.card is not None
        if served.refused_because:
            raise CardMismatchError(served.refused_because)
        _check_health(served)
        return served, served.card

    async def _generate(
        self, request: inference_pb2.PreprocessedRequest, running: Running, sink: Sender | Folded
    ) -> None:
        context = running.context
        served, card = self._begin(request.model, running)
        if makes_vectors_alone(card):
            raise UnsupportedError(f"model {card.name!r} makes embeddings alone: call Embed", param="model")
        check_request(request, card)
        full = with_defaults(request, card)
        full.request_id = context.id()
        generation = Generation(served.handler.name, full, card.vocab_size)
        is_resumed = request.HasField("resume")
        async with Turn(served, running, request.priority, is_resumed=is_resumed) as turn:
            if not turn.has_come:
                if response := generation.end(is_stopped=True):
                    await sink.send(self._sign(response, served))
                return
            try:
                await self._run(served, full, generation, running, sink, turn)
            finally:
                running.num_tokens = generation.num_tokens

    async def _run(
        self,
        served: Served,
        request: inference_pb2.PreprocessedRequest,
        generation: Generation,
        running: Running,
        sink: Sender | Folded,
        turn: Turn,
    ) -> None:
        context = running.context
        stream = served.handler(to_dict(request) if served.gives_dicts else request, context)
        async with contextlib.aclosing(stream) as items:
            async for item in items:
                if generation.feed_token(item):
                    if not sink.put_token(generation.sequence - 1, item):
                        await sink.rest()
                    continue
                if not turn.has_output:  # the first one always comes here
                    turn.output()
                if response := generation.feed(item):
                    await sink.send(self._sign(response, served))
                else:
                    await asyncio.sleep(0)
                if generation.is_finished:
                    return
        if response := generation.end(is_stopped=context.is_stopped()):
            await sink.send(self._sign(response, served))

    @staticmethod
    def _sign(response: inference_pb2.GenerateResponse, served: Served) -> inference_pb2.GenerateResponse:
        if response.sequence == 0:
            response.worker.instance_id = served.instance.instance_id
            response.worker.epoch = served.instance.epoch
        return response


class EndpointServicer(endpoint_pb2_grpc.EndpointServicer):
    """Call over a server's endpoints of any kind."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def Call(self, request: endpoint_pb2.CallRequest, context: Any) -> None:  # type: ignore[override]
        await self._server.requests.serve(
            context, f"{ENDPOINT}/Call", request.request_id, lambda running: self._call(request, running)
        )

    async def _call(self, request: endpoint_pb2.CallRequest, running: Running) -> None:
        served = running.served = self._server.endpoint(request.endpoint)
        if served.card:
            raise EndpointNotFoundError(
                f"endpoint {served.name} is a model's: call {INFERENCE}/Generate", param="endpoint"
            )
        _check_health(served)
        payload = request.data if request.WhichOneof("payload") == "data" else from_value(request.json)
        async with Turn(served, running) as turn:
            if turn.has_come:
                await self._run(served, payload, running, turn)

    @staticmethod
    async def _run(served: Served, payload: Any, running: Running, turn: Turn) -> None:
        sequence = 0
        async with contextlib.aclosing(served.handler(payload, running.context)) as items:
            async for item in items:
                if not turn.has_output:
                    turn.output()
                await running.sender.send(to_call_response(item, sequence, served.handler.name))
                sequence += 1


def _check_health(served: Served) -> None:
    if served.sick_because:
        raise NotReadyError(f"the health check of {served.name} fails ({served.sick_because}): try another instance")


_READERS = {InferenceServicer._run.__code__, InferenceServicer._embed.__code__, EndpointServicer._run.__code__}
_OURS = {"dynamo_grpc.lane", "dynamo_grpc.generation", __name__}


def handler_in(frame: FrameType, called: FrameType) -> str | None:
    """The name of the handler that a frame reads, if it does now: what it calls may be our own work too."""
    if frame.f_code not in _READERS or called.f_globals.get("__name__") in _OURS:
        return None
    served = frame.f_locals.get("served")
    return served.handler.name if served is not None else None


def to_call_response(item: Any, sequence: int, handler_name: str) -> endpoint_pb2.CallResponse:
    """What a handler yielded, as a message.

    Raises:
        HandlerOutputError: it is neither bytes nor a JSON value.
    """
    if isinstance(item, (bytes, bytearray)):
        return endpoint_pb2.CallResponse(sequence=sequence, data=bytes(item))
    try:
        return endpoint_pb2.CallResponse(sequence=sequence, json=to_value(item))
    except TypeError as error:
        raise HandlerOutputError(
            f"handler {handler_name} yielded {item!r:.80} ({type(item).__name__}): {error}; "
            "an endpoint's handler yields bytes or JSON values"
        ) from None


class Folded:
    """Takes a stream's outputs as a Sender does, and makes one answer of them.

    Args:
        sender: of the request; it knows whether the client is still there.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self.response = inference_pb2.GenerateResponse()

    async def send(self, message: inference_pb2.GenerateResponse) -> None:
        """Add an output."""
        self._sender.check_open(message)
        fold(self.response, message)
        await self.rest()

    def put_token(self, sequence: int, token_id: int) -> bool:
        """Add a token of choice 0; False asks for a rest."""
        token = token_response(sequence, token_id)
        self._sender.check_open(token)
        fold(self.response, token)
        return False

    async def rest(self) -> None:
        """Nothing is written: a handler that never awaits must not hold the loop."""
        await asyncio.sleep(0)


def fold(folded: inference_pb2.GenerateResponse, response: inference_pb2.GenerateResponse) -> None:
    """Add one output of a stream to the answer that is all of them."""
    by_index = {choice.index: choice for choice in folded.choices}
    for delta in response.choices:
        choice = by_index.get(delta.index)
        if choice is None:
            folded.choices.add().CopyFrom(delta)
            continue
        text, reasoning, calls = choice.text + delta.text, choice.reasoning + delta.reasoning, len(choice.tool_calls)
        choice.MergeFrom(delta)  # lists are concatenated
        if delta.HasField("text"):
            choice.text = text
        if delta.HasField("reasoning"):
            choice.reasoning = reasoning
        del choice.tool_calls[calls:]
        for call in delta.tool_calls:
            _fold_call(choice, call)
    for name in ("usage", "prompt_info", "worker", "annotations"):
        if response.HasField(name):  # type: ignore[arg-type]
            getattr(folded, name).CopyFrom(getattr(response, name))


def _fold_call(choice: inference_pb2.ChoiceDelta, delta: inference_pb2.ToolCallDelta) -> None:
    for call in choice.tool_calls:
        if call.index == delta.index:
            call.arguments += delta.arguments
            return
    choice.tool_calls.append(delta)
