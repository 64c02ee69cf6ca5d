"""A TCP proxy whose connections can be cut, and made to stand still."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from typing import Any


class Proxy:
    """Forwards a port of its own to a target, in a thread of its own.

    Args:
        target: port on 127.0.0.1.
    """

    def __init__(self, target: int) -> None:
        self.target, self.port = target, 0
        self._loop = asyncio.new_event_loop()
        self._open: asyncio.Event
        self._is_refusing = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def num_connections(self) -> int:
        """Connections that are open now."""
        return len(self._writers) // 2

    def drop(self) -> None:
        """Let nothing through, and close nothing: as a cable that was pulled."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def refuse(self) -> None:
        """Break all connections, and those to come."""

        def apply() -> None:
            self._is_refusing = True
            for writer in self._writers:
                writer.transport.abort()

        self._loop.call_soon_threadsafe(apply)

    def restore(self) -> None:
        """Let everything through again."""

        def apply() -> None:
            self._is_refusing = False
            self._open.set()

        self._loop.call_soon_threadsafe(apply)

    def close(self) -> None:
        self.refuse()
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _start(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if self._is_refusing:
                writer.transport.abort()
                return
            await self._open.wait()
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self.target)
            pair = {writer, target_writer}
            self._writers |= pair
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pump(reader, target_writer))
                    group.create_task(self._pump(target_reader, writer))
            finally:
                self._writers -= pair
                for each in pair:
                    each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
