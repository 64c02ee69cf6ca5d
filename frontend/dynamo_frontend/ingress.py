"""The frontend's gRPC port: the Inference service that workers speak, for clients of any language, without a registry.

A request is routed, moved, cancelled, limited, counted and logged as one over HTTP is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
from opentelemetry import trace

from dynamo_frontend.answer import LOOK_S, STALL_S
from dynamo_frontend.catalog import Catalog, Model
from dynamo_frontend.embeddings import ask, prepare_embed
from dynamo_frontend.messages import Outputs, prepare_message
from dynamo_frontend.metrics import Metrics
from dynamo_frontend.preprocess import Part
from dynamo_frontend.record import Record
from dynamo_frontend.relay import Relay, Relays
from dynamo_frontend.serving import Serving, told_of
from dynamo_frontend.settings import FrontendSettings
from dynamo_frontend.writing import whole
from dynamo_grpc import (
    DeadlineError,
    DrainingError,
    MeshError,
    ModelNotFoundError,
    RequestCancelledError,
    SlowReaderError,
    UnsupportedError,
    health,
)
from dynamo_grpc.errors import names
from dynamo_grpc.lifecycle import State
from dynamo_grpc.orca import LoadMeter, add_open_rca
from dynamo_grpc.requests import Requests, Running
from dynamo_grpc.router import EMBED, GENERATE
from dynamo_grpc.server import SERVER_OPTIONS, bind
from dynamo_grpc.services import CONTROL, INFERENCE
from dynamo_grpc.status import abort
from dynamo_grpc.v1 import (
    control_pb2,
    control_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    model_card_pb2,
)

#: How long what was sent last may take to leave.
_STOP_S = 1.0
#: A connection whose time is over may finish its streams for so long.
_AGE_GRACE_S = 3600.0

Work = Callable[[Running, Record, Model], Awaitable[None]]


class Ingress:
    """The server.

    Attributes:
        port: that it listens on.
        requests: those that run.
    """

    def __init__(
        self, settings: FrontendSettings, metrics: Metrics, serving: Serving, catalog: Callable[[], Catalog]
    ) -> None:
        self._settings, self._metrics, self._serving, self.catalog = settings, metrics, serving, catalog
        self._meter = LoadMeter(self._load)
        self.requests = Requests(lambda _: self._refusal(), self._tell_empty, self._meter)
        self.is_draining = False
        self.port = 0
        self._empty = asyncio.Event()
        self._server: grpc.aio.Server | None = None
        self._health: health.HealthServicer | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._told_models: set[str] = set()

    async def start(self) -> None:
        """Bind the port, and answer.

        Raises:
            ConfigurationError: the port is taken.
        """
        settings = self._settings
        assert settings.grpc_port is not None
        own = {
            "grpc.so_reuseport": int(settings.shares_grpc_port),
            "grpc.max_receive_message_length": settings.max_body_bytes,
        }
        if settings.grpc_max_connection_age_s:  # clients behind a balancer look for others now and then
            own["grpc.max_connection_age_ms"] = int(settings.grpc_max_connection_age_s * 1000)
            own["grpc.max_connection_age_grace_ms"] = int(_AGE_GRACE_S * 1000)
        server = grpc.aio.server(options=tuple((dict(SERVER_OPTIONS) | own).items()))
        inference_pb2_grpc.add_InferenceServicer_to_server(_Inference(self), server)  # type: ignore[abstract]
        control_pb2_grpc.add_ControlServicer_to_server(_Control(self), server)  # type: ignore[abstract]
        self._health = health.add_health(server)
        add_open_rca(server, self._meter)
        health.add_reflection(server, [INFERENCE, CONTROL])
        self.port = bind(server, settings.grpc_host, settings.grpc_port)
        await self._update_health()
        await server.start()
        self._server = server
        self._watching = asyncio.get_running_loop().create_task(self._watch(), name="health of the gRPC port")

    async def _watch(self) -> None:
        while True:
            await self.catalog().wait_changed()
            await self._update_health()

    async def _update_health(self) -> None:
        """Say what can be asked: the process, each model."""
        assert self._health is not None
        ready = set() if self.is_draining else {f"model/{model.card.name}" for model in self.catalog().ready()}
        states = dict.fromkeys(self._told_models, False) | {"": bool(ready), INFERENCE: bool(ready)}
        self._told_models = ready
        for name, serves in (states | dict.fromkeys(ready, True)).items():
            await self._health.set(name, health.SERVING if serves else health.NOT_SERVING)

    async def say_draining(self) -> None:
        """Health says that it is about to end; requests are still taken."""
        self.is_draining = True
        if self._health is not None:
            await self._update_health()

    async def stop(self, limit_s: float) -> None:
        """Take no more requests, let those that run finish within the (first) limit, and end."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop(limit_s), name="end of the gRPC port")
        await asyncio.shield(self._stopping)

    async def _stop(self, limit_s: float) -> None:
        server = self._server
        if server is None:
            return
        if self._watching is not None:
            self._watching.cancel()
        await self.say_draining()
        stopping = asyncio.ensure_future(server.stop(limit_s + _STOP_S))  # new calls are refused from here on
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self.requests:
                    self._empty.clear()
                    await self._empty.wait()
        for running in self.requests:
            running.end(_leaving())
        await stopping

    def _load(self) -> tuple[dict[str, float], float | None]:
        num = max(self._serving.num_running, len(self.requests))  # one whose trailer is made has left its place
        return {"num_running": num}, num / limit if (limit := self._settings.max_requests) else None

    async def _tell_empty(self) -> None:
        self._empty.set()

    def _refusal(self) -> MeshError | None:
        return _leaving() if self._stopping is not None else None

    async def serve(
        self, call: Any, method: str, label: str, request_id: str, model: str, work: Work, *, is_stream: bool = False
    ) -> None:
        """Answer one call: its model is found, there is room, and how it ended is written down."""

        async def answer(running: Running) -> None:
            context = running.context
            record = Record(self._metrics, context.id(), label, model[:100], is_stream=is_stream)
            record.span = trace.get_current_span()
            self._serving.book.add(record)
            try:
                with self._serving.room():
                    await work(running, record, await self._serving.find(record, self._name(model)))
            except asyncio.CancelledError:
                is_late = context.remaining_s() == 0.0
                record.fail(
                    running.ended_by
                    or (DeadlineError if is_late else RequestCancelledError)("the client's call has ended")
                )
                raise
            except Exception as error:
                told = told_of(error, context.id())
                record.fail(told)
                raise told from error
            finally:
                record.end()

        await self.requests.serve(call, method, request_id, answer)

    def _name(self, name: str) -> str:
        """Of the model that is meant: the only one, if none is named."""
        ready = self.catalog().ready()
        if name or not ready:
            return name
        if len(ready) > 1:
            known = names([model.card.name for model in ready])
            raise ModelNotFoundError(f"several models, none named: there is {known}", param="model")
        return ready[0].card.name

    async def generate(
        self, request: inference_pb2.PreprocessedRequest, running: Running, record: Record, model: Model
    ) -> None:
        """Ask a model, and send its outputs; all that comes while one is sent goes with the next."""
        send = running.sender.send
        async with self._asking(request, running, record, model) as (make_relays, outputs):

            async def rest() -> None:
                if outputs.has_some:
                    await send(outputs.take())

            with _stall_watch(running, outputs):
                relays = make_relays()
                await relays.run(outputs.add, rest)
                await send(outputs.take(relays.usage))

    async def generate_once(
        self, request: inference_pb2.PreprocessedRequest, running: Running, record: Record, model: Model
    ) -> inference_pb2.GenerateResponse:
        """Ask a model for a whole answer."""
        async with self._asking(request, running, record, model) as (make_relays, outputs):
            outputs.add(await whole(make_relays, record.begin_again))
            return outputs.take(make_relays.made.usage)

    @contextlib.asynccontextmanager
    async def _asking(
        self, request: inference_pb2.PreprocessedRequest, running: Running, record: Record, model: Model
    ) -> AsyncIterator[tuple[_Maker, Outputs]]:
        """What asks a model, and what makes outputs of its answer; the tokens are counted at the end."""
        instance_id = request.routing.instance_id if request.routing.HasField("instance_id") else None
        if instance_id is None:
            model.router.check_room()
        parts, shown, formatted = await prepare_message(request, model)
        record.prepared()
        record.prompt_tokens = sum(len(part.message.token_ids) for part in parts if part.counts_prompt)
        record.num_choices = sum(part.num_choices for part in parts)
        for part in parts:
            part.message.request_id = running.context.id()
        mode, outputs = (
            self._settings.router_mode,
            Outputs(record.num_choices, has_text=shown.has_text, formatted=formatted),
        )

        def relay(part: Part) -> Relay:
            made = Relay(model, part, shown, running.context, record, mode, instance_id)
            if part.index == 0:
                made.on_more = outputs.add_more
            return made

        make_relays = _Maker(lambda: Relays([relay(part) for part in parts]))
        try:
            yield make_relays, outputs
        finally:
            usage = make_relays.made.usage
            record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
            record.cached_tokens = usage.cached_tokens if usage.HasField("cached_tokens") else None

    async def embed(
        self, request: inference_pb2.EmbedRequest, running: Running, record: Record, model: Model
    ) -> inference_pb2.EmbedResponse:
        """Have a model make vectors."""
        model.check_type(model_card_pb2.MODEL_TYPE_EMBEDDING, "embeddings")
        model.router.check_room()
        message = await prepare_embed(request, model)
        message.request_id = running.context.id()
        return await ask(message, model, running.context, record, self._settings.router_mode)


class _Maker:
    """Makes the relays of a request, again when it is begun again.

    Attributes:
        made: the last ones.
    """

    def __init__(self, make: Callable[[], Relays]) -> None:
        self._make, self.made = make, Relays([])

    def __call__(self) -> Relays:
        self.made = self._make()
        return self.made


@contextlib.contextmanager
def _stall_watch(running: Running, outputs: Outputs) -> Iterator[None]:
    """End a request whose client takes nothing for STALL_S."""
    loop = asyncio.get_running_loop()
    seen, since = -1, loop.time()
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer, seen, since
        if not running.sender.is_writing or outputs.sequence != seen:
            seen, since = outputs.sequence, loop.time()
        elif loop.time() - since >= STALL_S:
            running.end(SlowReaderError(f"the client took nothing for {STALL_S:.0f} s"))
        timer = loop.call_later(LOOK_S, look)

    timer = loop.call_later(LOOK_S, look)
    try:
        yield
    finally:
        timer.cancel()


def _leaving() -> DrainingError:
    return DrainingError("the frontend is shutting down: send the request again")


class _Inference(inference_pb2_grpc.InferenceServicer):
    """Inference over all models of the mesh. Outputs come on each request's own stream: there is no Deliver."""

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress

    async def Generate(self, request: inference_pb2.PreprocessedRequest, context: Any) -> None:  # type: ignore[override]
        ingress = self._ingress

        async def work(running: Running, record: Record, model: Model) -> None:
            await ingress.generate(request, running, record, model)

        await ingress.serve(context, GENERATE, "generate", request.request_id, request.model, work, is_stream=True)

    async def GenerateOnce(self, request: inference_pb2.PreprocessedRequest, context: Any) -> Any:
        ingress, answers = self._ingress, []

        async def work(running: Running, record: Record, model: Model) -> None:
            answers.append(await ingress.generate_once(request, running, record, model))

        await ingress.serve(context, f"{GENERATE}Once", "generate_once", request.request_id, request.model, work)
        return answers[0]

    async def Embed(self, request: inference_pb2.EmbedRequest, context: Any) -> Any:
        ingress, answers = self._ingress, []

        async def work(running: Running, record: Record, model: Model) -> None:
            answers.append(await ingress.embed(request, running, record, model))

        await ingress.serve(context, EMBED, "embed", request.request_id, request.model, work)
        return answers[0]

    async def Deliver(self, request: inference_pb2.DeliverRequest, context: Any) -> None:  # type: ignore[override]
        await abort(context, UnsupportedError("a frontend has no deliveries: outputs come on each request's stream"))


class _Control(control_pb2_grpc.ControlServicer):
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
        found = [running for running in self._ingress.requests if running.context.id() == request.request_id]
        for running in found:
            running.context.stop_generating()
        return control_pb2.StopResponse(found=bool(found))

    async def _elsewhere(self, request: Any, context: Any) -> Any:
        await abort(context, UnsupportedError("a frontend doesn't serve this: ask a worker"))

    GetFile = WatchLoad = SubscribeKvEvents = GetMetrics = Drain = _elsewhere
    LoadLora = UnloadLora = ListLoras = _elsewhere
