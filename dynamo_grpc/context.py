"""The context of a request: its id, deadline and metadata, and how it is stopped.

A handler's context is the current one while the handler runs; calls of other endpoints made meanwhile become its
children without being handed it. Stopping or killing a context does the same to its children.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from typing import Protocol

logger = logging.getLogger(__name__)

_current: contextvars.ContextVar[Context | None] = contextvars.ContextVar("dynamo_grpc_context", default=None)


class Link(Protocol):
    """Something that ends with a context: a running call of ours."""

    def stop(self) -> None: ...
    def kill(self) -> None: ...


class Context:
    """What a handler knows of its request, and what a client holds to end one.

    Args:
        id: the request id; made when not given.
        metadata: str to str, travels with every call made under this context.
        timeout_s: seconds from now after which the request ends, if it has a limit.
        clock: monotonic seconds.

    Attributes:
        killed_at: when it was killed, by `time.monotonic`; None if it wasn't.
    """

    def __init__(
        self,
        id: str | None = None,  # noqa: A002 - Dynamo's name
        metadata: Mapping[str, str] | None = None,
        *,
        timeout_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._id = id or uuid.uuid4().hex
        self.metadata: dict[str, str] = dict(metadata or {})
        self._clock = clock
        self._deadline = None if timeout_s is None else clock() + timeout_s
        self._stopped = False
        self._killed = False
        self.killed_at: float | None = None
        self._on_cancel: list[Callable[[], object]] = []
        self._settling: set[asyncio.Future[object]] = set()
        # weak: a reader that drops its stream is gone, and the stream's end cancels the call
        self._links: weakref.WeakSet[Link] = weakref.WeakSet()
        self._waiters: weakref.WeakSet[asyncio.Future[bool]] = weakref.WeakSet()  # who waits for one holds it

    def id(self) -> str:
        """The request id."""
        return self._id

    def is_stopped(self) -> bool:
        """Whether somebody asked for an early end (a stop or a kill)."""
        return self._stopped

    def is_killed(self) -> bool:
        """Whether the request was ended at once."""
        return self._killed

    def stop_generating(self) -> None:
        """Ask for an early end: handlers see `is_stopped()`, and what they still yield is delivered. Idempotent."""
        if self._stopped:
            return
        self._stopped = True
        self._wake()
        for link in tuple(self._links):
            link.stop()

    def kill(self) -> None:
        """End the request now: its calls are cancelled, what is in flight is dropped. Idempotent."""
        if self._killed:
            return
        self._stopped = self._killed = True
        self.killed_at = time.monotonic()
        self._wake()
        callbacks, self._on_cancel = self._on_cancel, []
        for callback in callbacks:
            self._call(callback)
        for link in tuple(self._links):
            link.kill()

    def on_cancel(self, callback: Callable[[], object]) -> None:
        """Call `callback` when the request is cancelled: its client went, its time is over, it was killed.

        For engines that have an abort call. It is called at that moment, whatever the handler is doing; a coroutine
        function runs as a task, and the request counts as running until it has ended. At once if it is cancelled
        already; never for one that ends by itself or is stopped gently. What it raises goes to the log.

        Example:
            context.on_cancel(lambda: engine.abort(request_id))
        """
        if self._killed:
            self._call(callback)
        else:
            self._on_cancel.append(callback)

    async def settle(self) -> None:
        """Return when what `on_cancel` began has ended."""
        while self._settling:
            await asyncio.wait(self._settling)

    def _call(self, callback: Callable[[], object]) -> None:
        try:
            result = callback()
        except Exception:
            logger.exception("an on_cancel callback of request %s failed", self._id)
            return
        if inspect.isawaitable(result):
            task = asyncio.ensure_future(result)
            self._settling.add(task)
            task.add_done_callback(self._settled)

    def _settled(self, task: asyncio.Future[object]) -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("an on_cancel callback of request %s failed", self._id, exc_info=error)

    def async_killed_or_stopped(self) -> asyncio.Future[bool]:
        """A future of the running loop that becomes True when the context is stopped or killed."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._stopped:
            future.set_result(True)
        else:
            self._waiters.add(future)
        return future

    def remaining_s(self) -> float | None:
        """Seconds until the deadline (0.0 when it has passed); None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    def link(self, child: Link) -> None:
        """Let `child` end when this context does; it is stopped or killed at once if that has happened already."""
        self._links.add(child)
        if self._killed:
            child.kill()
        elif self._stopped:
            child.stop()

    def unlink(self, child: Link) -> None:
        """Forget a child that has ended."""
        self._links.discard(child)

    def _wake(self) -> None:
        for future in tuple(self._waiters):
            if not future.done():
                future.set_result(True)
        self._waiters.clear()


def current_context() -> Context | None:
    """The context of the request whose handler is running, if one is."""
    return _current.get()


def enter_context(context: Context) -> contextvars.Token[Context | None]:
    """Make `context` the current one of this task."""
    return _current.set(context)


def leave_context(token: contextvars.Token[Context | None]) -> None:
    """Undo `enter_context`."""
    _current.reset(token)
