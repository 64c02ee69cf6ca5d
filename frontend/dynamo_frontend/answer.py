"""One HTTP answer: it ends with its client, holds headers until there is something to say, and ends exactly once.

Starlette's StreamingResponse costs 10 to 12 µs for each piece, a third of a token's whole budget; this writes ASGI
messages itself, and pieces of a stream past ASGI where the server allows it (`wire`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence

from opentelemetry import trace
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dynamo_frontend import envelope
from dynamo_frontend.record import Record
from dynamo_frontend.wire import EXTENSION, Wire
from dynamo_grpc import (
    Context,
    DeadlineError,
    DrainingError,
    MeshError,
    RequestCancelledError,
    SlowReaderError,
)

logger = logging.getLogger(__name__)

Headers = Sequence[tuple[bytes, bytes]]

#: Headers wait this long for the first output or error, so that an error has its true status.
HOLD_S = 10.0
#: After that, a comment is sent when nothing was for so long, for the proxies in between.
PULSE_S = 15.0
#: A client that takes no byte, or sends none of its body, for so long is given up.
STALL_S = 30.0
#: How often both are looked at.
LOOK_S = 5.0


class Writer:
    """What a request's work writes to.

    Attributes:
        late_headers: gives headers that are known when the answer begins.
        next_number: of the next event, where events have numbers.
    """

    def __init__(self, send: Send, headers: Headers, wire: Wire | None) -> None:
        self._send, self._headers, self._wire = send, list(headers), wire
        self.is_started = False
        self.late_headers: Callable[[], Headers] = tuple
        self.next_number: Callable[[], int] = int
        self._waiting = b""
        self.num_writes = 0

    async def json(self, status: int, body: bytes, headers: Headers = ()) -> None:
        """The whole answer at once."""
        self.is_started = True
        length = (b"content-length", str(len(body)).encode())
        all_headers = [
            *self._headers, *self.late_headers(), *headers, (b"content-type", b"application/json"), length
        ]  # fmt: skip
        await self._send({"type": "http.response.start", "status": status, "headers": all_headers})
        await self._send({"type": "http.response.body", "body": body})

    def add(self, data: bytes) -> bool:
        """A piece of an event stream, as it goes over the wire.

        Returns:
            False when it has to wait for `flush`, which must be awaited before the next piece.
        """
        wire = self._wire
        if self.is_started and wire is not None and not wire.is_full:
            wire.write_chunk(data)
            self.num_writes += 1
            return True
        self._waiting += data
        return False

    async def flush(self, *, more: bool = True) -> None:
        """Write what waits, once the client takes it."""
        data, self._waiting = self._waiting, b""
        if more and not data:
            return
        if not self.is_started:
            self.is_started = True
            kind = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": [*self._headers, *self.late_headers(), *kind]}
            )
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.num_writes += 1

    async def events(self, data: bytes) -> None:
        """A piece of an event stream; returns when the client takes more."""
        if not self.add(data):
            await self.flush()

    async def end(self, data: bytes) -> None:
        """The last piece of an event stream."""
        self._waiting += data
        await self.flush(more=False)


class _Watch:
    """Looks after a stream now and then: a comment when nothing was written, the end when nothing is taken."""

    def __init__(self, writer: Writer, wire: Wire | None, give_up: Callable[[], None]) -> None:
        self._writer, self._wire, self._give_up = writer, wire, give_up
        self._loop = asyncio.get_running_loop()
        self._written_at = self._taken_at = self._loop.time()
        self._num_writes = self._num_unsent = 0
        self._pulse: asyncio.Task[None] | None = None
        self._timer = self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._timer = self._loop.call_later(LOOK_S, self._look)
        now = self._loop.time()
        if self._wire is not None and self._wire.is_full:
            if (num_unsent := self._wire.get_write_buffer_size()) != self._num_unsent:
                self._num_unsent, self._taken_at = num_unsent, now
            elif now - self._taken_at >= STALL_S:
                self._give_up()
            return
        self._num_unsent = 0
        if self._writer.num_writes != self._num_writes:
            self._num_writes, self._written_at = self._writer.num_writes, now
        elif now - self._written_at >= (PULSE_S if self._writer.is_started else HOLD_S):
            self._pulse = self._loop.create_task(self._writer.events(b": keep-alive\n\n"))

    def close(self) -> None:
        """Look no more."""
        self._timer.cancel()
        if self._pulse is not None:
            self._pulse.cancel()


class Answer(Response):
    """The ASGI answer of one request.

    Args:
        work: writes the answer; what it raises becomes an error with its true status, or an error event once the
            stream has begun.
        span: of the request, not entered yet.
        context: killed when the client goes.
        dialect: how errors look.
    """

    def __init__(
        self,
        work: Callable[[Writer], Awaitable[None]],
        span: contextlib.AbstractContextManager[trace.Span],
        context: Context,
        record: Record,
        headers: Headers,
        *,
        is_stream: bool,
        dialect: envelope.Dialect = envelope.OPENAI,
    ) -> None:
        self._work, self._context, self._record, self._is_stream = work, context, record, is_stream
        self._span = span
        self._dialect = dialect
        self._headers = headers
        self._given_up: MeshError | None = None
        self.background = None  # what FastAPI reads of a Response; nothing else of it is used

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._span as self._record.span:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = scope.get("extensions", {}).get(EXTENSION)
        writer = Writer(send, self._headers, wire)
        task = asyncio.current_task()
        assert task is not None

        def give_up(error: MeshError) -> None:
            if self._given_up is None:
                self._given_up = error
                task.cancel()

        def stalled() -> None:
            wire.abort()
            give_up(SlowReaderError(f"the client took no byte for {STALL_S:.0f} s"))

        def lost() -> None:
            give_up(RequestCancelledError("the client went away"))

        gone = None
        if wire is None:
            gone = asyncio.ensure_future(_client_gone(receive, lost))
        elif wire.is_closing():
            lost()
        else:
            wire.on_lost = lost
            wire.watch_client()
        watch = _Watch(writer, wire, stalled) if self._is_stream else None
        try:
            await self._run(writer)
        except asyncio.CancelledError:
            self._context.kill()
            if self._given_up is None:
                error = DrainingError("the frontend is shutting down: send the request again")
                self._record.fail(error)
                with contextlib.suppress(Exception):
                    await asyncio.wait_for(self._tell(writer, error), 1.0)
                raise
            self._record.fail(self._given_up)
            task.uncancel()
        finally:
            if gone:
                gone.cancel()
            else:
                wire.on_lost = None
            if watch:
                watch.close()
            self._record.end()

    async def _run(self, writer: Writer) -> None:
        try:
            await self._work_in_time(writer)
        except Exception as error:
            told, is_unexpected = envelope.to_mesh_error(error)
            self._record.fail(told)
            if is_unexpected:
                logger.exception("request failed", extra={"request_id": self._context.id(), "error_id": told.error_id})
            await self._tell(writer, told)

    async def _work_in_time(self, writer: Writer) -> None:
        if (left_s := self._context.remaining_s()) is None:
            await self._work(writer)
            return
        limit = asyncio.timeout(left_s)
        try:
            async with limit:
                await self._work(writer)
        except TimeoutError:
            if not limit.expired():
                raise
            raise DeadlineError(f"request {self._context.id()} took longer than its time-out") from None

    async def _tell(self, writer: Writer, error: MeshError) -> None:
        """An error with its status, or as the last event of a stream that has begun."""
        dialect, request_id = self._dialect, self._context.id()
        content = dialect.body(error, request_id)
        if writer.is_started:
            content = dialect.event_body(error, request_id, writer.next_number()) if dialect.event_body else content
            await writer.end(dialect.event + b"data: " + content + b"\n\n")
        else:
            await writer.json(error.http_status, content, envelope.headers(error))


async def _client_gone(receive: Receive, lost: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    lost()
