"""The HTTP application: routes, bodies in, answers out."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

import grpc
import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import exposition
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from dynamo_frontend.anthropic import CountRequest
from dynamo_frontend.asked import request_id_of
from dynamo_frontend.catalog import Catalog, Model
from dynamo_frontend.debug import explain
from dynamo_frontend.federation import Federation, merge
from dynamo_frontend.inference import ControlService, InferenceService
from dynamo_frontend.ingress import Ingress
from dynamo_frontend.kinds import KINDS, MESSAGES
from dynamo_frontend.metrics import Metrics
from dynamo_frontend.openapi import describe
from dynamo_frontend.page import add_page
from dynamo_frontend.polling import BackendPolling
from dynamo_frontend.preprocess import naming
from dynamo_frontend.processes import METRICS_DIR
from dynamo_frontend.prompts import chat_tokens, prompt_tokens, text_of
from dynamo_frontend.schemas import BusyRequest, DetokenizeRequest, RouteRequest, TokenizeRequest
from dynamo_frontend.serving import Serving, error_response, told_of
from dynamo_frontend.settings import FrontendSettings
from dynamo_grpc import (
    DistributedRuntime,
    HttpError,
    InvalidRequestError,
    MeshError,
    UnsupportedError,
    __version__,
    dump,
)
from dynamo_grpc.admin import open_admin_port
from dynamo_grpc.records import endpoint_of
from dynamo_grpc.services import CONTROL, INFERENCE
from dynamo_grpc.v1 import control_pb2_grpc, inference_pb2_grpc

#: How often the gauge of the registry is set.
_REGISTRY_S = 1.0


class Frontend:
    """The application and what it holds.

    Attributes:
        is_draining: it is about to end: /health says so, and what comes is still answered.
    """

    def __init__(
        self, settings: FrontendSettings, make_runtime: Callable[[], DistributedRuntime] = DistributedRuntime
    ) -> None:
        self._settings, self._make_runtime = settings, make_runtime
        self.metrics = Metrics()
        self.is_draining = False
        self._serving = Serving(settings, self.metrics, lambda: self.catalog)
        self.catalog: Catalog
        self.ingress = Ingress(settings, self.metrics, self._serving, lambda: self.catalog, add_services)
        self._polling: BackendPolling | None = None
        self._federation = Federation(lambda why: self.metrics.worker_errors.labels(why).inc())
        self.app = FastAPI(
            title="dynamo-grpc", version=__version__, lifespan=self._lifespan, docs_url=None, redoc_url=None
        )
        self._direct = {kind.path: self._serving.handler(kind) for kind in KINDS}
        self._add_routes(self.app)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        async with self._make_runtime() as runtime:
            settings = self._settings
            self.catalog = Catalog(
                runtime,
                settings.router_mode,
                settings.namespace,
                settings.instance_wait_s,
                settings.migration_limit,
                settings.first_output_timeout_s,
                settings.output_gap_timeout_s,
                settings.thresholds,
                self.metrics,
                settings.media,
            )
            dump.install(self._serving.book.lines)
            tasks = [asyncio.ensure_future(self.metrics.watch_loop()), asyncio.ensure_future(self._watch_registry())]
            if settings.backend_metrics_interval_s:
                endpoint, interval_s = settings.backend_metrics_endpoint, settings.backend_metrics_interval_s
                self._polling = BackendPolling(runtime, endpoint, interval_s, self.metrics)
                tasks.append(asyncio.ensure_future(self._polling.run()))
            if settings.grpc_port is not None:
                await self.ingress.start()
            async with open_admin_port(settings.grpc_admin_port):
                yield
            await self.ingress.stop(0.0)
            for task in tasks:
                task.cancel()
            await self.catalog.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application.

        FastAPI declares all routes; those that ask a model are called without its middlewares, which cost 0.3 ms a
        request and 4 µs a token and do nothing for them: those handlers answer all of their errors themselves.
        """
        handler = self._direct.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        with self._serving.bodies.held(scope):
            if handler is None:
                await self.app(scope, receive, _with_id(scope, send) if scope["type"] == "http" else send)
            else:
                response = await handler(Request(scope, receive))
                await response(scope, receive, send)

    def _add_routes(self, app: FastAPI) -> None:
        bodies: dict[str, type[BaseModel]] = {}

        def post(path: str, schema: type[BaseModel], handler: Callable[[Request], Awaitable[Any]], text: str) -> None:
            bodies[path] = schema
            app.post(path, summary=text, response_model=None)(handler)

        for kind in KINDS:
            post(kind.path, kind.schema, self._direct[kind.path], kind.summary)
        post("/v1/messages/count_tokens", CountRequest, self._count_tokens, "Count the tokens of such a request")
        post("/tokenize", TokenizeRequest, self._tokenize, "Token ids of a prompt or a chat")
        post("/detokenize", DetokenizeRequest, self._detokenize, "Text of token ids")
        app.get("/v1/models", summary="List the models")(self._list_models)
        app.get("/v1/models/{name:path}", summary="Describe a model", response_model=None)(self._get_model)
        app.get("/health", summary="Whether requests can be served", response_model=None)(self._health)
        app.get("/live", summary="Whether the process lives")(self._live)
        app.get("/metrics", summary="Metrics in Prometheus' format", response_model=None)(self._metrics)
        if self._settings.has_admin_api:
            app.get("/busy_threshold", summary="When workers are busy, by model")(self._get_thresholds)
            app.get("/debug/requests", summary="Requests that run, and the last that failed")(self._debug_requests)
            post("/debug/route", RouteRequest, self._debug_route, "Where a request would go, and why")
            post("/busy_threshold", BusyRequest, self._set_thresholds, "Set when a model's workers are busy")
        if self._settings.has_page:
            add_page(app)
        document = functools.cache(lambda: describe(app, bodies, {kind.path for kind in KINDS if kind.streams}))
        app.openapi = document  # type: ignore[method-assign]
        app.exception_handler(MeshError)(self._on_error)
        app.exception_handler(ClientDisconnect)(self._on_error)
        app.exception_handler(ValidationError)(self._on_error)
        app.exception_handler(Exception)(self._on_error)
        app.exception_handler(HTTPException)(self._on_http_error)

    async def _count_tokens(self, request: Request) -> Response:
        request_id = request_id_of(request)
        try:
            asked = CountRequest.model_validate(await self._serving.bodies.read_json(request)).to_chat()
            model = await self.catalog.find(asked.model)
            with naming("messages", places=asked.places):
                tokens = await chat_tokens(asked.messages, asked, model)
        except Exception as error:
            return error_response(told_of(error, request_id), request_id, MESSAGES.dialect)
        return Response(orjson.dumps({"input_tokens": len(tokens)}), media_type="application/json")

    async def _tokenize(self, request: Request) -> dict[str, Any]:
        body = TokenizeRequest.model_validate(await self._serving.bodies.read_json(request))
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give prompt or messages", param="prompt")
        model = await self.catalog.find(body.model)
        with naming("messages" if body.prompt is None else "prompt"):
            tokens = await prompt_tokens(body, model)
        return {"count": len(tokens), "max_model_len": model.card.context_length or None, "tokens": tokens}

    async def _detokenize(self, request: Request) -> dict[str, Any]:
        body = DetokenizeRequest.model_validate(await self._serving.bodies.read_json(request))
        model = await self.catalog.find(body.model)
        return {"prompt": text_of(body.tokens, model)}

    async def _list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [_model_dict(model) for model in self.catalog.ready()]}

    async def _get_model(self, name: str) -> dict[str, Any]:
        return _model_dict(await self.catalog.find(name))

    async def _debug_requests(self) -> dict[str, Any]:
        return self._serving.book.told()

    async def _debug_route(self, request: Request) -> dict[str, Any]:
        body = RouteRequest.model_validate(await self._serving.bodies.read_json(request))
        return explain(await self.catalog.find(body.model), self._settings.router_mode)

    async def _get_thresholds(self) -> dict[str, Any]:
        models = sorted(self.catalog.all(), key=lambda model: model.card.name)
        return {"thresholds": [_thresholds_dict(model) for model in models]}

    async def _set_thresholds(self, request: Request) -> dict[str, Any]:
        if METRICS_DIR in os.environ:
            text = "of several processes only one would hear of it: set the thresholds by the frontend's flags"
            raise UnsupportedError(text)
        body = BusyRequest.model_validate(await self._serving.bodies.read_json(request))
        model = await self.catalog.find(body.model)
        values = body.model_dump(exclude_unset=True, exclude={"model"})
        self.catalog.set_thresholds(model, replace(model.busy.thresholds, **values))
        return _thresholds_dict(model)

    async def _health(self) -> Response:
        ready = self.catalog.ready()
        shown = [(live, model) for model in self.catalog.all() for live in model.instances.routable()]
        instances = [live.instance for live, _ in shown]
        registry = self.catalog.registry.status()
        since = registry["unreachable_since"]
        body: dict[str, Any] = {
            "status": "draining" if self.is_draining else "healthy" if ready else "unhealthy",
            "version": __version__,
            "namespace": self._settings.namespace or None,
            "registry": registry,
            "models": [model.card.name for model in ready],
            "endpoints": sorted({f"dyn://{endpoint_of(instance)}" for instance in instances}),
            "instances": [
                {
                    "instance_id": f"{live.instance_id:016x}",
                    "address": live.instance.address,
                    "model": live.instance.model,
                    "epoch": live.instance.epoch,
                    "is_listed": model.instances.is_listed(live),
                }
                for live, model in shown
            ],
        }
        if self.is_draining:
            body["message"] = "the frontend is about to end: send new requests elsewhere"
        elif ready and since:
            body["message"] = f"serving what was known, registry unreachable since {since}"
        elif ready and registry["problem"]:
            body["message"] = f"serving; {registry['problem']}"
        elif not ready:
            body["message"] = (
                "no model has an instance that answers"
                if self.catalog.is_connected
                else "the registry has not answered yet"
            )
        status = 200 if ready and not self.is_draining else 503
        return Response(orjson.dumps(body), status, media_type="application/json")

    async def _live(self) -> dict[str, str]:
        return {"status": "live"}

    async def _watch_registry(self) -> None:
        """Of several processes, each keeps its own figure: one alone is asked for all of them."""
        while True:
            self.metrics.registry_up.set(not self.catalog.registry.problem)
            await asyncio.sleep(_REGISTRY_S)

    async def _metrics(self, request: Request) -> Response:
        families = list(self.catalog.families())
        if self._polling is not None:
            families += self._polling.families()
        # in a thread: with many models it takes longer than tokens may wait
        text = (await asyncio.to_thread(self.metrics.text, families)).decode()
        if request.query_params.get("workers", "0") not in ("", "0"):
            texts = await self._federation.ask_all(self.catalog.connections)
            text = await asyncio.to_thread(merge, [text, *texts])
        return Response(text, media_type=exposition.CONTENT_TYPE_LATEST)

    async def _on_error(self, request: Request, error: Exception) -> Response:
        request_id = request_id_of(request)
        return error_response(told_of(error, request_id), request_id)

    async def _on_http_error(self, request: Request, error: HTTPException) -> Response:
        text = f"{error.detail}: {request.method} {request.url.path}"
        return error_response(HttpError(error.status_code, text), request_id_of(request))


def add_services(server: grpc.aio.Server, ingress: Ingress) -> list[str]:
    """What the gRPC port serves."""
    from dynamo_frontend.oip.open_inference_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
    from dynamo_frontend.oip.service import SERVICE, OpenInferenceService

    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(ingress), server)  # type: ignore[abstract]
    control_pb2_grpc.add_ControlServicer_to_server(ControlService(ingress), server)  # type: ignore[abstract]
    add_GRPCInferenceServiceServicer_to_server(OpenInferenceService(ingress), server)  # type: ignore[abstract]
    return [INFERENCE, CONTROL, SERVICE]


def _with_id(scope: Scope, send: Send) -> Send:
    """Answers say the request's id, whatever gives them."""
    request_id = request_id_of(Request(scope)).encode()

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            if not any(name.lower() == b"x-request-id" for name, _ in headers):
                message = {**message, "headers": [*headers, (b"x-request-id", request_id)]}
        await send(message)

    return send_with_id


def _thresholds_dict(model: Model) -> dict[str, Any]:
    return {"model": model.card.name, **asdict(model.busy.thresholds)}


def _model_dict(model: Model) -> dict[str, Any]:
    return {
        "id": model.card.name,
        "object": "model",
        "created": model.created,
        "owned_by": "dynamo-grpc",
        "max_model_len": model.card.context_length or None,
    }
