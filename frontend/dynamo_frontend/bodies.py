"""Bodies of HTTP requests: read as JSON, each and all together within their limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import orjson
from fastapi import Request

from dynamo_frontend import large_json
from dynamo_frontend.answer import STALL_S
from dynamo_frontend.asked import headers_of
from dynamo_grpc import InvalidRequestError, OverloadedError, RequestCancelledError, TooLargeError

#: Bytes of a body that always has room, and of one that takes milliseconds.
_SMALL, _LARGE = 64 * 1024, 1024 * 1024
_HELD = "dynamo_frontend.held"  # in the ASGI scope


class Bodies:
    """Reads them, and knows what those of all running requests take together.

    Args:
        max_bytes: of one.
        max_total_bytes: of all, but for small ones: who has no memory left loses every stream.
        overload_status: of the answer where all have too many.

    Attributes:
        num_bytes: that are held now.
    """

    def __init__(self, max_bytes: int, max_total_bytes: int, overload_status: int = 503) -> None:
        self._max, self._max_total = min(max_bytes, max_total_bytes), max_total_bytes
        self._overload_status = overload_status
        self.num_bytes = 0

    @contextlib.contextmanager
    def held(self, scope: MutableMapping[str, Any]) -> Iterator[None]:
        """A request: what is read inside the block counts until its end."""
        held = scope[_HELD] = [0]
        try:
            yield
        finally:
            self.num_bytes -= held[0]

    async def read_json(self, request: Request) -> Any:
        """The body as a JSON value.

        Raises:
            TooLargeError: it is larger than the limit; the rest isn't read.
            OverloadedError: there are too many of them.
            RequestCancelledError: the client sends no more of it.
            InvalidRequestError: it is no JSON.
        """
        declared = headers_of(request).get("content-length", "0")
        if declared.isdigit() and int(declared) > self._max:
            raise self._too_large()
        body = await self._read(request)
        try:
            value = large_json.loads(body)
        except orjson.JSONDecodeError as error:
            raise InvalidRequestError(f"the body is no JSON: {error}") from None
        if len(body) >= _LARGE:
            await asyncio.sleep(0.001)  # it took milliseconds: others get their turns, in which they take several steps
        return value

    async def _read(self, request: Request) -> bytearray:
        loop, body, held = asyncio.get_running_loop(), bytearray(), request.scope[_HELD]
        try:
            async with asyncio.timeout(STALL_S) as limit:
                async for piece in request.stream():
                    body += piece
                    if len(body) > self._max:
                        raise self._too_large()
                    if len(body) > _SMALL:
                        self._hold(held, len(body) - held[0])
                        limit.reschedule(loop.time() + STALL_S)
        except TimeoutError:
            error = RequestCancelledError(f"the client sent nothing more of its body for {STALL_S:.0f} s")
            error.http_status = 408
            raise error from None
        return body

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"the body is larger than {self._max / 2**20:g} MiB")

    def _hold(self, held: list[int], num_bytes: int) -> None:
        if self.num_bytes + num_bytes > self._max_total:
            self.num_bytes -= held[0]  # the others go on with them
            held[0] = 0
            text = f"the bodies of running requests have more than {self._max_total // 2**20} MiB (--max-bodies-mb)"
            error = OverloadedError(text, retry_after_s=1.0)
            error.http_status = self._overload_status
            raise error
        self.num_bytes += num_bytes
        held[0] += num_bytes
