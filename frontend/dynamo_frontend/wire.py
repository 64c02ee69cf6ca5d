"""The way of answers onto their sockets: what one turn of the loop writes leaves at its end, in a row.

A write at once, as asyncio has it, wakes the client that sleeps on it, and that is the dearest part of a write. In a
row, a client that is awake already isn't woken again, and what one turn writes to one client (headers, first event)
is one write. A stream's pieces go past ASGI too: a coroutine and a dict for each costs as much as all the rest of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: Where an ASGI scope holds the Wire of its connection.
EXTENSION = "dynamo_grpc.wire"

#: How long a connection that was just opened may take to its first request while the server ends.
_FIRST_REQUEST_S = 1.0

#: Those that have something to write at the end of this turn of the loop.
_waiting: list[Wire] = []


def _flush_all() -> None:
    wires = _waiting[:]
    _waiting.clear()
    for wire in wires:
        wire.flush()


class Wire(asyncio.Transport):
    """A client's connection: its transport, with the writes of a turn together.

    Attributes:
        is_full: the client doesn't take what was written; a stream should wait until it does.
        on_lost: called when the connection is gone, if somebody cares.
        watch_client: to be called when the body was read: a large one stops the reading, and with it the sight of a
            client that goes.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport, self._loop = transport, loop
        self._pieces: list[bytes] = []
        self.is_full = False
        self.on_lost: Callable[[], None] | None = None
        self.watch_client: Callable[[], None] = lambda: None

    def write(self, data: Any) -> None:
        if not self._pieces:
            if not _waiting:
                self._loop.call_soon(_flush_all)
            _waiting.append(self)
        self._pieces.append(data)

    def write_chunk(self, data: bytes) -> None:
        """A chunk of a response that has begun."""
        self.write(b"%x\r\n%b\r\n" % (len(data), data))

    def flush(self) -> None:
        """Write what waits now."""
        pieces = self._pieces
        if pieces and not self._transport.is_closing():
            self._transport.write(pieces[0] if len(pieces) == 1 else b"".join(pieces))
        self._pieces = []

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        self._pieces = []
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size() + sum(map(len, self._pieces))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._transport.set_protocol(protocol)


class WireProtocol(HttpToolsProtocol):
    """uvicorn's protocol over a Wire, which its requests know."""

    _is_leaving = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._wire = Wire(transport, self.loop)
        self._wire.watch_client = self._watch_client
        super().connection_made(self._wire)

    def _watch_client(self) -> None:
        if not self.pipeline:  # requests that wait behind this one keep the reading stopped
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._wire.on_lost is not None:
            self._wire.on_lost()

    def pause_writing(self) -> None:
        self._wire.is_full = True
        super().pause_writing()

    def resume_writing(self) -> None:
        self._wire.is_full = False
        super().resume_writing()

    def shutdown(self) -> None:
        if self.cycle is not None:
            super().shutdown()
            return
        # It was taken and has not asked yet: closing it now would reset a request that is on its way.
        self._is_leaving = True
        self.loop.call_later(_FIRST_REQUEST_S, self._close_unused)

    def _close_unused(self) -> None:
        if self.cycle is None:
            self.transport.close()

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        if self.cycle is not None and (self._is_leaving or getattr(self.config.app, "is_draining", False)):
            self.cycle.keep_alive = False  # the answer says so, and the client's next request goes elsewhere

    def on_message_begin(self) -> None:
        super().on_message_begin()
        scope: Any = self.scope
        scope["extensions"] = {EXTENSION: self._wire}
