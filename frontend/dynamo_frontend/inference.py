"""Inference and the clients' part of Control at the frontend's gRPC port, over all models of the mesh."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from dynamo_frontend.asking import Asking
from dynamo_frontend.catalog import Model
from dynamo_frontend.embeddings import ask, prepare_embed
from dynamo_frontend.ingress import Ingress
from dynamo_frontend.messages import Outputs, prepare_message
from dynamo_frontend.record import Record
from dynamo_frontend.writing import whole
from dynamo_grpc import UnsupportedError
from dynamo_grpc.lifecycle import State
from dynamo_grpc.requests import Running
from dynamo_grpc.router import EMBED, GENERATE
from dynamo_grpc.status import abort
from dynamo_grpc.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc, model_card_pb2


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Inference. Outputs come on each request's own stream: there is no Deliver."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def Generate(self, request: inference_pb2.PreprocessedRequest, context: Any) -> None:  # type: ignore[override]
        async def work(running: Running) -> None:
            async def generate(record: Record, model: Model) -> None:
                await self._generate(request, running, record, model)

            await self._ingress.account(running, "generate", request.model, generate, is_stream=True)

        await self._ingress.requests.serve(context, GENERATE, request.request_id, work)

    async def GenerateOnce(self, request: inference_pb2.PreprocessedRequest, context: Any) -> Any:
        answers = []

        async def work(running: Running) -> None:
            async def generate(record: Record, model: Model) -> None:
                async with self._asking(request, running, record, model) as (asking, outputs):
                    outputs.add(await whole(asking, record.begin_again))
                    answers.append(outputs.take(asking.made.usage))

            await self._ingress.account(running, "generate_once", request.model, generate)

        await self._ingress.requests.serve(context, f"{GENERATE}Once", request.request_id, work)
        return answers[0]

    async def Embed(self, request: inference_pb2.EmbedRequest, context: Any) -> Any:
        answers = []

        async def work(running: Running) -> None:
            async def embed(record: Record, model: Model) -> None:
                model.check_type(model_card_pb2.MODEL_TYPE_EMBEDDING, "embeddings")
                model.router.check_room()
                message = await prepare_embed(request, model)
                message.request_id = running.context.id()
                answers.append(await ask(message, model, running.context, record, self._ingress.router_mode))

            await self._ingress.account(running, "embed", request.model, embed)

        await self._ingress.requests.serve(context, EMBED, request.request_id, work)
        return answers[0]

    async def Deliver(self, request: inference_pb2.DeliverRequest, context: Any) -> None:  # type: ignore[override]
        await abort(context, UnsupportedError("a frontend has no deliveries: outputs come on each request's stream"))

    async def _generate(
        self, request: inference_pb2.PreprocessedRequest, running: Running, record: Record, model: Model
    ) -> None:
        """Send a model's outputs; all that comes while one is sent goes with the next."""
        send = running.sender.send
        async with self._asking(request, running, record, model) as (asking, outputs):

            async def rest() -> None:
                if outputs.has_some:
                    await send(outputs.take())

            with self._ingress.stall_watch(running, lambda: outputs.sequence):
                relays = asking()
                await relays.run(outputs.add, rest)
                await send(outputs.take(relays.usage))

    @contextlib.asynccontextmanager
    async def _asking(
        self, request: inference_pb2.PreprocessedRequest, running: Running, record: Record, model: Model
    ) -> AsyncIterator[tuple[Asking, Outputs]]:
        """What asks a model, and what makes outputs of its answer."""
        instance_id = request.routing.instance_id if request.routing.HasField("instance_id") else None
        if instance_id is None:
            model.router.check_room()
        parts, shown, formatted = await prepare_message(request, model)
        wants_none = request.output_options.HasField("text") and not request.output_options.text
        with Asking(model, parts, shown, running.context, record, self._ingress.router_mode, instance_id) as asking:
            outputs = Outputs(record.num_choices, has_text=shown.has_text and not wants_none, formatted=formatted)
            asking.on_more = outputs.add_more
            yield asking, outputs


class ControlService(control_pb2_grpc.ControlServicer):
    """The part of Control that is for clients: which models there are, and the gentle stop."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def Describe(self, request: control_pb2.DescribeRequest, context: Any) -> control_pb2.DescribeResponse:  # type: ignore[override]
        ready = self._ingress.catalog().ready()
        response = control_pb2.DescribeResponse(
            cards=[model.card for model in ready],
            state=(State.DRAINING if self._ingress.is_draining else State.READY if ready else State.STARTING).value,
            num_requests=len(self._ingress.requests),
            reason="" if ready else "no model has a worker that answers",
        )
        response.measured_at.GetCurrentTime()
        return response

    async def Stop(self, request: control_pb2.StopRequest, context: Any) -> control_pb2.StopResponse:  # type: ignore[override]
        return control_pb2.StopResponse(found=self._ingress.requests.stop(request.request_id))

    async def _elsewhere(self, request: Any, context: Any) -> Any:
        await abort(context, UnsupportedError("a frontend doesn't serve this: ask a worker"))

    GetFile = WatchLoad = SubscribeKvEvents = GetMetrics = Drain = _elsewhere
    LoadLora = UnloadLora = ListLoras = _elsewhere
