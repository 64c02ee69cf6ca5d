"""One request to a model over HTTP: read, let in, worked on, and answered however it ends."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson
from fastapi import Request, Response

from dynamo_frontend import envelope
from dynamo_frontend.answer import Answer, Writer
from dynamo_frontend.asked import headers_of, instance_of, request_id_of, timeout_of
from dynamo_frontend.bodies import Bodies
from dynamo_frontend.catalog import Catalog, Model
from dynamo_frontend.debug import Book, explain
from dynamo_frontend.kinds import Exchange, Kind, R
from dynamo_frontend.metrics import Metrics
from dynamo_frontend.record import Record, shown_name
from dynamo_frontend.settings import FrontendSettings
from dynamo_grpc import Context, InvalidRequestError, MeshError, OverloadedError, semconv
from dynamo_grpc.admission import Drain
from dynamo_grpc.metadata import printable
from dynamo_grpc.telemetry import server_span

#: So many workers a header explains.
_MAX_EXPLAINED = 16

logger = logging.getLogger(__name__)


class Serving:
    """Answers the requests of all kinds.

    Args:
        catalog: the models; there is one once the application has started.

    Attributes:
        book: the requests that run now, and the last that failed.
        bodies: reads those of all requests.
    """

    def __init__(self, settings: FrontendSettings, metrics: Metrics, catalog: Callable[[], Catalog]) -> None:
        self._settings, self._metrics, self._catalog = settings, metrics, catalog
        self._drain = Drain()
        self.bodies = Bodies(settings.max_body_bytes, settings.max_bodies_bytes, settings.overload_status)
        self.book = Book()

    @property
    def num_running(self) -> int:
        """Requests that have a place."""
        return self._drain.num_running

    def handler(self, kind: Kind[Any]) -> Callable[[Request], Awaitable[Response]]:
        """What answers the requests of one kind."""

        async def answer(request: Request) -> Response:
            return await self._answer(request, kind)

        return answer

    async def _answer(self, request: Request, kind: Kind[R]) -> Response:
        """What answers a request; it has all of its errors already, or will have."""
        request_id = request_id_of(request)
        record = Record(self._metrics, request_id, kind.label)
        try:
            body = kind.schema.model_validate(await self.bodies.read_json(request))
            if self._settings.is_strict and (strange := body.unknown()):
                raise InvalidRequestError(f"unknown fields: {', '.join(strange)} (--strict)", param=strange[0])
            record.is_stream = body.stream
            record.model = shown_name(body.model)
            context = Context(request_id, timeout_s=timeout_of(request))
            mode, instance_id = self._settings.router_mode, instance_of(request)
            wants_route = self._settings.has_admin_api and "x-explain-route" in headers_of(request)
            exchange = Exchange(body, request_id, context, record, mode, instance_id)
        except Exception as error:
            # answered here: what reaches Starlette's outermost handler is raised again, and ends the connection
            told = told_of(error, request_id)
            self.book.add(record)
            record.fail(told)
            with server_span(f"POST {kind.path}", headers_of(request), self._attributes(kind, request_id)) as span:
                record.span = span
                record.end()
            return error_response(told, request_id, kind.dialect)
        headers = [(b"x-request-id", request_id.encode())]
        if kind.dialect.id_header:
            headers.append((kind.dialect.id_header.encode(), request_id.encode()))
        if unknown := body.unknown():
            listed = printable(", ".join(unknown))
            headers.append((b"x-warning", f"unknown fields are ignored: {listed}".encode()))

        async def work(writer: Writer) -> None:
            model = await self.find(record, body.model)
            model.check_type(kind.model_type, kind.what)
            if instance_id is None:
                model.router.check_room()  # before it costs anything
            if wants_route:
                explained = explain(model, mode, _MAX_EXPLAINED)
                writer.late_headers = lambda: [(b"x-route", orjson.dumps({"instance": record.where, **explained}))]
            await kind.answer(exchange, model, writer)

        attributes = self._attributes(kind, request_id)
        attributes |= {semconv.REQUEST_MODEL: record.model, semconv.STREAM: body.stream}
        self.book.add(record)

        async def admitted(writer: Writer) -> None:
            with self.room():
                await work(writer)

        return Answer(
            admitted,
            server_span(f"POST {kind.path}", headers_of(request), attributes, says_failure=False),
            context,
            record,
            headers,
            is_stream=body.stream,
            dialect=kind.dialect,
        )

    @staticmethod
    def _attributes(kind: Kind[Any], request_id: str) -> dict[str, Any]:
        return {
            semconv.HTTP_METHOD: "POST",
            semconv.HTTP_ROUTE: kind.path,
            semconv.OPERATION: kind.operation,
            semconv.REQUEST_ID: request_id,
        }

    async def find(self, record: Record, name: str) -> Model:
        """The model that a request names; its figures are the model's from here on.

        Raises:
            MeshError: as `Catalog.find`.
        """
        catalog = self._catalog()
        if known := catalog.known(name):  # its name is counted also when nobody serves it now
            record.begin(*known)
        model = await catalog.find(name)
        if not known:
            record.begin(model.namespace, model.card.name)
        return model

    @contextlib.contextmanager
    def room(self) -> Iterator[None]:
        """A place for a request while it is worked on.

        Raises:
            OverloadedError: there is none, here or at the workers.
        """
        limit = self._settings.max_requests
        try:
            if limit is not None and self._drain.num_running >= limit:
                text = f"this frontend is full: --max-requests={limit} run"
                raise OverloadedError(text, retry_after_s=self._drain.retry_after_s(1, limit))
            self._drain.began()
            try:
                yield
            finally:
                self._drain.ended()
        except OverloadedError as error:
            error.http_status = self._settings.overload_status
            raise


def told_of(error: Exception, request_id: str) -> MeshError:
    """What the client is told of an exception; one that nobody expected goes to the log."""
    told, is_unexpected = envelope.to_mesh_error(error)
    if is_unexpected:
        logger.error("request failed", exc_info=error, extra={"request_id": request_id, "error_id": told.error_id})
    return told


def error_response(error: MeshError, request_id: str, dialect: envelope.Dialect = envelope.OPENAI) -> Response:
    """An error as a whole answer."""
    response = Response(dialect.body(error, request_id), error.http_status, media_type="application/json")
    for name in filter(None, ("x-request-id", dialect.id_header)):
        response.headers[name] = request_id
    for key, value in envelope.headers(error):
        response.headers[key.decode()] = value.decode()
    return response
