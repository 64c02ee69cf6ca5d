"""A load of streamed chats over raw sockets: cheap enough to share two cores with what it measures."""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

#: An event with text in it.
_CONTENT = re.compile(rb'"content":\s*"(?!")')
PROMPT = "Tell me something about the sea and its many creatures. " * 8
_PROBE_PAUSE_S = 0.05


@dataclass(slots=True)
class Seen:
    """What a client saw, in seconds.

    Attributes:
        totals: from a request to its end.
        gaps: between reads with new text.
    """

    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)


def body(tokens: int, prompt: str = PROMPT) -> bytes:
    """A request."""
    message = {"role": "user", "content": prompt}
    return json.dumps({"model": "bench", "stream": True, "max_tokens": tokens, "messages": [message]}).encode()


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.seen: Seen | None = None
        self.transport: asyncio.Transport
        self.first: asyncio.Future[None]
        self._done: asyncio.Future[None]
        self._started = self._last = 0.0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    async def ask(self, content: bytes, request_id: str = "") -> None:
        """Send a request, and return at the end of its answer."""
        self.send(content, request_id)
        await self._done

    def send(self, content: bytes, request_id: str = "") -> None:
        """Send a request."""
        loop = asyncio.get_running_loop()
        self.first, self._done = loop.create_future(), loop.create_future()
        self._started, self._last, self._tail = time.perf_counter(), 0.0, b""
        name = f"x-request-id: {request_id}\r\n" if request_id else ""
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{name}"
        self.transport.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if _CONTENT.search(data):
            if not self._last:
                if self.seen:
                    self.seen.ttft.append(now - self._started)
                if not self.first.done():
                    self.first.set_result(None)
            elif self.seen:
                self.seen.gaps.append(now - self._last)
            self._last = now
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self._fail(f"an answer failed: {data!r:.500}")
            return
        self._tail = (self._tail + data)[-64:]
        if self._tail.endswith(b"0\r\n\r\n"):
            if b"[DONE]" not in self._tail:
                self._fail(f"an answer failed: {data!r:.500}")
                return
            if self.seen:
                self.seen.totals.append(now - self._started)
            if not self._done.done():  # a request that the end of the load cancelled
                self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if hasattr(self, "_done"):
            self._fail("the server closed the connection")

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(ConnectionError(why))
            self._done.exception()  # a stream that is cut on purpose has no reader


async def connect(address: str) -> Client:
    """A connection to HOST:PORT."""
    host, port = address.split(":")
    _, client = await asyncio.get_running_loop().create_connection(Client, host, int(port))
    return client


@dataclass(slots=True)
class Load:
    """A closed loop of `streams` clients, and a probe beside them.

    Attributes:
        spread_s: the clients begin one after the other within this time, as independent users would.
    """

    address: str
    streams: int
    tokens: int
    spread_s: float = 0.0

    async def run(self, warm_up_s: float, seconds: float, mark: Callable[[], None]) -> tuple[Seen, Seen]:
        """Load for `seconds` after a warm-up; gives what clients and probe saw.

        Args:
            mark: called at the beginning and at the end of the measurement.
        """
        seen, probe = Seen(), Seen()
        clients = [await connect(self.address) for _ in range(self.streams + 1)]
        content = body(self.tokens)

        async def loop(client: Client, wait_s: float) -> None:
            await asyncio.sleep(wait_s)
            while True:
                await client.ask(content)

        async def probing(client: Client) -> None:
            while True:
                await client.ask(content)
                await asyncio.sleep(_PROBE_PAUSE_S)

        *others, prober = clients
        tasks = [asyncio.ensure_future(probing(prober))]
        for number, client in enumerate(others):
            tasks.append(asyncio.ensure_future(loop(client, self.spread_s * number / self.streams)))
        await asyncio.sleep(warm_up_s + self.spread_s)
        for client in others:
            client.seen = seen
        prober.seen = probe
        mark()
        await asyncio.sleep(seconds)
        mark()
        for client in clients:
            client.seen = None
        for task in tasks:
            task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        for client in clients:
            client.transport.abort()
        return seen, probe


def percentile_ms(values: Sequence[float], percent: int) -> float:
    """A percentile of seconds, in milliseconds."""
    if len(values) < 2:
        return values[0] * 1e3 if values else 0.0
    return statistics.quantiles(values, n=100)[percent - 1] * 1e3
