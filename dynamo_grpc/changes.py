"""Waiting for the next change of something that a callback tells of."""

from __future__ import annotations

import asyncio


class Changes:
    """`tell` wakes everybody who is in `wait`; who comes later waits for the next one."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    async def wait(self) -> None:
        """Return at the next change."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(future)
        try:
            await future
        finally:
            self._waiters.discard(future)

    def tell(self) -> None:
        """There was a change."""
        for future in tuple(self._waiters):
            if not future.done():
                future.set_result(None)
