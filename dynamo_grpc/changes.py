"""Waiting for the next change of something that a callback tells of."""

from __future__ import annotations

import asyncio


class Changes:
    """`tell` wakes everybody who is in `wait`; who comes later waits for the next one."""

    def __init__(self) -> None:
        self._waiters: list[asyncio.Future[None]] = []

    async def wait(self) -> None:
        """Return at the next change."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(future)
        await future

    def tell(self) -> None:
        """There was a change."""
        waiters, self._waiters = self._waiters, []
        for future in waiters:
            if not future.done():
                future.set_result(None)
