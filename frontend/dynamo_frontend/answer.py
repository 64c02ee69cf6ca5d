"""One HTTP answer: it races the client's leaving, holds headers until there is something to say, and ends exactly once.

Starlette's StreamingResponse costs 10 to 12 µs for each piece, a third of a token's whole budget; this writes ASGI
messages itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from dynamo_frontend import envelope
from dynamo_frontend.record import Record
from dynamo_grpc import Context, DeadlineError, DrainingError, MeshError, RequestCancelledError

logger = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]

#: Headers wait this long for the first output or error, so that an error has its true status.
HOLD_S = 10.0
#: After that, a comment is sent when nothing was for so long, for the proxies in between.
PULSE_S = 15.0


class Writer:
    """What a request's work writes to."""

    def __init__(self, send: Send, headers: Headers) -> None:
        self._send, self._headers = send, list(headers)
        self.is_started = False
        self._is_idle = False

    async def json(self, status: int, body: bytes, headers: Headers = ()) -> None:
        """The whole answer at once."""
        self.is_started = True
        length = (b"content-length", str(len(body)).encode())
        all_headers = [*self._headers, *headers, (b"content-type", b"application/json"), length]
        await self._send({"type": "http.response.start", "status": status, "headers": all_headers})
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, data: bytes) -> None:
        """A piece of an event stream, as it goes over the wire."""
        if not self.is_started:
            await self._start()
        self._is_idle = False
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """The end of an event stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        self.is_started = True
        kind = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await self._send({"type": "http.response.start", "status": 200, "headers": [*self._headers, *kind]})

    async def pulse(self) -> None:
        """Keep an event stream alive while nothing else is written."""
        await asyncio.sleep(HOLD_S)
        while True:
            if self._is_idle or not self.is_started:
                await self.events(b": keep-alive\n\n")
            self._is_idle = True  # until something is written
            await asyncio.sleep(PULSE_S)


class Answer(Response):
    """The ASGI answer of one request.

    Args:
        work: writes the answer; what it raises becomes an error with its true status, or an error event once the
            stream has begun.
        context: killed when the client goes.
    """

    def __init__(
        self,
        work: Callable[[Writer], Awaitable[None]],
        context: Context,
        record: Record,
        headers: Headers,
        *,
        is_stream: bool,
    ) -> None:
        self._work, self._context, self._record, self._is_stream = work, context, record, is_stream
        self._headers = headers
        self.background = None  # what FastAPI reads of a Response; nothing else of it is used

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = Writer(send, self._headers)
        work = asyncio.ensure_future(self._run(writer))
        gone = asyncio.ensure_future(_client_gone(receive))
        tasks: list[asyncio.Future[Any]] = [work, gone]
        if self._is_stream:
            tasks.append(asyncio.ensure_future(writer.pulse()))
        error: MeshError = RequestCancelledError("the client went away")
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            error = DrainingError("the frontend is shutting down: send the request again")
            raise
        finally:
            is_cut = not work.done()
            for task in tasks:
                task.cancel()
            if is_cut:
                self._context.kill()
                self._record.fail(error)
            await asyncio.gather(*tasks, return_exceptions=True)
            if is_cut and isinstance(error, DrainingError):
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(self._tell(writer, error), 1.0)
            self._record.end()

    async def _run(self, writer: Writer) -> None:
        try:
            try:
                async with asyncio.timeout(self._context.remaining_s()):
                    await self._work(writer)
            except TimeoutError:
                if self._context.remaining_s() != 0.0:
                    raise
                raise DeadlineError(f"request {self._context.id()} took longer than its time-out") from None
        except Exception as error:
            told, is_unexpected = envelope.to_mesh_error(error)
            self._record.fail(told)
            if is_unexpected:
                logger.exception("request failed", extra={"request_id": self._context.id(), "error_id": told.error_id})
            await self._tell(writer, told)

    async def _tell(self, writer: Writer, error: MeshError) -> None:
        """An error with its status, or as the last event of a stream that has begun."""
        content = envelope.body(error, self._context.id())
        if writer.is_started:
            await writer.events(b"data: " + content + b"\n\n")
            await writer.end()
        else:
            await writer.json(error.http_status, content, envelope.headers(error))


async def _client_gone(receive: Receive) -> None:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return
