"""The HTTP application: routes, bodies in, answers out."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from prometheus_client import exposition
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from dynamo_frontend import envelope
from dynamo_frontend.answer import Answer, Writer
from dynamo_frontend.anthropic import CountRequest, MessagesRequest
from dynamo_frontend.asked import instance_of, request_id_of, timeout_of
from dynamo_frontend.busy import Thresholds
from dynamo_frontend.catalog import Catalog, Model
from dynamo_frontend.choices import echoes
from dynamo_frontend.kinds import CHAT, COMPLETION, MESSAGES, RESPONSES, Kind, R
from dynamo_frontend.openapi import describe
from dynamo_frontend.preprocess import naming, text_of, token_ids_of
from dynamo_frontend.processes import METRICS_DIR
from dynamo_frontend.record import Metrics, Record
from dynamo_frontend.relay import Relay, Relays
from dynamo_frontend.responses import ResponsesRequest
from dynamo_frontend.schemas import (
    BusyRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    StreamOptions,
    TokenizeRequest,
)
from dynamo_frontend.writing import stream, whole
from dynamo_grpc import (
    Context,
    DistributedRuntime,
    HttpError,
    InvalidRequestError,
    MeshError,
    OverloadedError,
    RouterMode,
    TooLargeError,
    UnsupportedError,
    __version__,
)
from dynamo_grpc.admission import Drain
from dynamo_grpc.metadata import printable
from dynamo_grpc.migration import MIGRATION_LIMIT
from dynamo_grpc.records import endpoint_of
from dynamo_grpc.telemetry import server_span

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    """What the frontend's flags say."""

    namespace: str = ""
    router_mode: RouterMode = RouterMode.RoundRobin
    max_body_bytes: int = 64 * 1024 * 1024
    instance_wait_s: float = 10.0
    migration_limit: int = MIGRATION_LIMIT
    first_output_timeout_s: float | None = 120.0
    output_gap_timeout_s: float | None = 30.0
    max_requests: int | None = None
    overload_status: int = 503
    thresholds: Thresholds = field(default_factory=Thresholds)
    has_admin_api: bool = True
    is_strict: bool = False


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
        self._drain = Drain()
        self.catalog: Catalog
        self.app = FastAPI(title="dynamo-grpc", version=__version__, lifespan=self._lifespan)
        self._direct = {
            "/v1/chat/completions": self._chat,
            "/v1/completions": self._completion,
            "/v1/responses": self._responses,
            "/v1/messages": self._messages,
        }
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
            )
            yield
            await self.catalog.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application.

        FastAPI declares all routes; the two that stream are called without its middlewares, which cost 0.3 ms a request
        and 4 µs a token and do nothing for them: those handlers answer all of their errors themselves.
        """
        handler = self._direct.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if handler is None:
            await self.app(scope, receive, send)
            return
        response = await handler(Request(scope, receive))
        await response(scope, receive, send)

    def _add_routes(self, app: FastAPI) -> None:
        bodies: dict[str, type[BaseModel]] = {}

        def post(path: str, schema: type[BaseModel], handler: Callable[[Request], Awaitable[Any]], text: str) -> None:
            bodies[path] = schema
            app.post(path, summary=text, response_model=None)(handler)

        post("/v1/chat/completions", ChatRequest, self._chat, "Answer a chat")
        post("/v1/completions", CompletionRequest, self._completion, "Continue a text")
        post("/v1/responses", ResponsesRequest, self._responses, "Answer as the Responses API does")
        post("/v1/messages", MessagesRequest, self._messages, "Answer as Anthropic's Messages API does")
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
            post("/busy_threshold", BusyRequest, self._set_thresholds, "Set when a model's workers are busy")
        document = functools.cache(lambda: describe(app, bodies, self._direct))
        app.openapi = document  # type: ignore[method-assign]
        app.exception_handler(MeshError)(self._on_error)
        app.exception_handler(ValidationError)(self._on_error)
        app.exception_handler(Exception)(self._on_error)
        app.exception_handler(HTTPException)(self._on_http_error)

    # -- generation ---------------------------------------------------------------------------------------------------

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, CHAT)

    async def _completion(self, request: Request) -> Response:
        return await self._answer(request, COMPLETION)

    async def _responses(self, request: Request) -> Response:
        return await self._answer(request, RESPONSES)

    async def _messages(self, request: Request) -> Response:
        return await self._answer(request, MESSAGES)

    async def _count_tokens(self, request: Request) -> Response:
        request_id = request_id_of(request)
        try:
            asked = CountRequest.model_validate(await self._json(request)).to_chat()
            model = await self.catalog.find(asked.model)
            tokens = await token_ids_of(TokenizeRequest(model=asked.model, messages=asked.messages), model)
        except Exception as error:
            return _error_response(self._told(error, request_id), request_id, MESSAGES.dialect)
        return Response(orjson.dumps({"input_tokens": len(tokens)}), media_type="application/json")

    async def _answer(self, request: Request, kind: Kind[R]) -> Response:
        request_id = request_id_of(request)
        record = Record(self.metrics, request_id, kind.label)
        try:
            body = kind.schema.model_validate(await self._json(request))
            if self._settings.is_strict and (strange := body.unknown()):
                raise InvalidRequestError(f"unknown fields: {', '.join(strange)} (--strict)", param=strange[0])
            sampling = kind.to_sampling(body)
            record.is_stream = body.stream
            record.model = body.model[:100]
            context = Context(request_id, timeout_s=timeout_of(request))
            instance_id = instance_of(request)
        except Exception as error:
            # answered here: what reaches Starlette's outermost handler is raised again, and ends the connection
            told = self._told(error, request_id)
            record.fail(told)
            record.end()
            return _error_response(told, request_id, kind.dialect)
        headers = [(b"x-request-id", request_id.encode())]
        if kind.dialect.id_header:
            headers.append((kind.dialect.id_header.encode(), request_id.encode()))
        if unknown := body.unknown():
            listed = printable(", ".join(unknown))
            headers.append((b"x-warning", f"unknown fields are ignored: {listed}".encode()))

        async def work(writer: Writer) -> None:
            attributes = {"gen_ai.request.model": body.model, "request.id": request_id}
            with server_span(f"POST {request.scope['path']}", request.headers, attributes):
                model = await self.catalog.find(body.model)
                record.begin(model.card.name)
                model.check_type(kind.model_type, kind.what)
                if instance_id is None:
                    model.router.check_room()  # before it costs anything
                with naming(kind.prompt_field):
                    parts = await kind.prepare(sampling, model)
                for part in parts:
                    part.message.request_id = request_id
                mode, relays = self._settings.router_mode, Relays([])

                def make_relays() -> Relays:
                    nonlocal relays
                    relays = Relays(
                        [Relay(model, sampling, part, context, record, mode, instance_id) for part in parts]
                    )
                    return relays

                assert model.preparation is not None
                options = (body.stream and sampling.stream_options) or StreamOptions()
                tokenizer = model.preparation.tokenizer
                shape = kind.shape(request_id, body, tokenizer and tokenizer.base)
                try:
                    if body.stream:
                        begin = shape.begin(sum(part.num_choices for part in parts), make_relays().usage)
                        begin += b"".join(shape.event(piece) for part in parts for piece in echoes(part))
                        await stream(writer, relays, shape, begin, options)
                    else:
                        pieces = kind.select(sampling, await whole(make_relays), parts)
                        usage, num = relays.usage, relays.num_migrations
                        moved = [(b"x-migrations", b"%d" % num)] if num else []
                        await writer.json(200, shape.body(pieces, usage, num), moved)
                finally:
                    usage = relays.usage
                    record.prompt_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens

        return Answer(
            lambda writer: self._admit(work, writer),
            context,
            record,
            headers,
            is_stream=body.stream,
            dialect=kind.dialect,
        )

    async def _admit(self, work: Callable[[Writer], Awaitable[None]], writer: Writer) -> None:
        """Do a request's work if there is room for it."""
        limit = self._settings.max_requests
        try:
            if limit is not None and self._drain.num_running >= limit:
                text = f"this frontend is full: --max-requests={limit} run"
                raise OverloadedError(text, retry_after_s=self._drain.retry_after_s(1, limit))
            self._drain.began()
            try:
                await work(writer)
            finally:
                self._drain.ended()
        except OverloadedError as error:
            error.http_status = self._settings.overload_status
            raise

    async def _json(self, request: Request) -> Any:
        """The body as a JSON value.

        Raises:
            TooLargeError: it is larger than the limit; the rest isn't read.
            InvalidRequestError: it is no JSON.
        """
        limit = self._settings.max_body_bytes
        declared = request.headers.get("content-length", "0")
        pieces, size = [], int(declared) if declared.isdigit() else 0
        if size <= limit:
            size = 0
            async for piece in request.stream():
                size += len(piece)
                if size > limit:
                    break
                pieces.append(piece)
        if size > limit:
            raise TooLargeError(f"the body is larger than {limit // 2**20} MiB")
        try:
            return orjson.loads(b"".join(pieces))
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"the body is no JSON: {error}") from None

    # -- the rest -----------------------------------------------------------------------------------------------------

    async def _tokenize(self, request: Request) -> dict[str, Any]:
        body = TokenizeRequest.model_validate(await self._json(request))
        if (body.prompt is None) == (body.messages is None):
            raise InvalidRequestError("give prompt or messages", param="prompt")
        model = await self.catalog.find(body.model)
        tokens = await token_ids_of(body, model)
        return {"count": len(tokens), "max_model_len": model.card.context_length or None, "tokens": tokens}

    async def _detokenize(self, request: Request) -> dict[str, Any]:
        body = DetokenizeRequest.model_validate(await self._json(request))
        model = await self.catalog.find(body.model)
        return {"prompt": text_of(body.tokens, model)}

    async def _list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [_model_dict(model) for model in self.catalog.ready()]}

    async def _get_model(self, name: str) -> dict[str, Any]:
        return _model_dict(await self.catalog.find(name))

    async def _get_thresholds(self) -> dict[str, Any]:
        models = sorted(self.catalog.all(), key=lambda model: model.card.name)
        return {"thresholds": [_thresholds_dict(model) for model in models]}

    async def _set_thresholds(self, request: Request) -> dict[str, Any]:
        if METRICS_DIR in os.environ:
            text = "of several processes only one would hear of it: set the thresholds by the frontend's flags"
            raise UnsupportedError(text)
        body = BusyRequest.model_validate(await self._json(request))
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

    async def _metrics(self) -> Response:
        self.metrics.registry_up.set(not self.catalog.registry.problem)
        return Response(self.metrics.text(), media_type=exposition.CONTENT_TYPE_LATEST)

    async def _on_error(self, request: Request, error: Exception) -> Response:
        request_id = request_id_of(request)
        return _error_response(self._told(error, request_id), request_id)

    @staticmethod
    def _told(error: Exception, request_id: str) -> MeshError:
        told, is_unexpected = envelope.to_mesh_error(error)
        if is_unexpected:
            logger.error("request failed", exc_info=error, extra={"request_id": request_id, "error_id": told.error_id})
        return told

    async def _on_http_error(self, request: Request, error: HTTPException) -> Response:
        text = f"{error.detail}: {request.method} {request.url.path}"
        return _error_response(HttpError(error.status_code, text), request_id_of(request))


def _error_response(error: MeshError, request_id: str, dialect: envelope.Dialect = envelope.OPENAI) -> Response:
    response = Response(dialect.body(error, request_id), error.http_status, media_type="application/json")
    for name in filter(None, ("x-request-id", dialect.id_header)):
        response.headers[name] = request_id
    for key, value in envelope.headers(error):
        response.headers[key.decode()] = value.decode()
    return response


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
