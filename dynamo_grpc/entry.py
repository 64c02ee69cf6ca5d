"""How a process of the mesh begins and ends: a runtime for a function, and what the signals do."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from dynamo_grpc import dump
from dynamo_grpc.admin import open_admin_port
from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.errors import ConfigurationError
from dynamo_grpc.runtime import DistributedRuntime
from dynamo_grpc.system import open_system_server
from dynamo_grpc.telemetry import configure_tracing

_R = TypeVar("_R")

logger = logging.getLogger(__name__)


_importing: contextvars.ContextVar[str] = contextvars.ContextVar("dynamo_grpc_importing", default="")


@contextlib.contextmanager
def importing(path: str) -> Iterator[None]:
    """While inside, a file is imported to find its worker: it must not run one by itself."""
    token = _importing.set(path)
    try:
        yield
    finally:
        _importing.reset(token)


def check_not_importing(name: str) -> None:
    """Refuse to run `name` while its file is only imported.

    Raises:
        ConfigurationError: says what the file lacks.
    """
    if path := _importing.get():
        raise ConfigurationError(
            f'importing {path} already runs {name}: put the line that runs it under `if __name__ == "__main__":`'
        )


async def _open_ports(runtime: DistributedRuntime, stack: contextlib.AsyncExitStack) -> None:
    """/live, /health and /metrics at DYN_SYSTEM_PORT, and channelz at DYN_GRPC_ADMIN_PORT, if these are set.

    Raises:
        ConfigurationError: one is no port, or taken.
    """
    if (port := _port("DYN_SYSTEM_PORT")) is not None:
        await runtime.start_server()
        opened = stack.enter_context(open_system_server(runtime.server, port))
        logger.info("system port %d: /live, /health and /metrics", opened)
    await stack.enter_async_context(open_admin_port(_port("DYN_GRPC_ADMIN_PORT")))


def _port(name: str) -> int | None:
    """A port from the environment; unset and -1 are none."""
    text = os.environ.get(name) or "-1"
    try:
        return port if (port := int(text)) >= 0 else None
    except ValueError:
        raise ConfigurationError(f"{name}={text!r} should be a port, 0 for a free one, or -1") from None


def dynamo_worker(
    **settings: Any,
) -> Callable[[Callable[..., Awaitable[_R]]], Callable[..., Awaitable[_R | None]]]:
    """Give an async function a runtime made from the environment, as its first argument.

    The first SIGTERM or SIGINT begins the shutdown (or cancels the function, if it serves no endpoint); a second one
    ends the process at once. The runtime is closed when the function returns.

    Args:
        settings: as DistributedRuntime takes them.
    """

    def decorate(function: Callable[..., Awaitable[_R]]) -> Callable[..., Awaitable[_R | None]]:
        @functools.wraps(function)
        async def run(*args: Any, **kwargs: Any) -> _R | None:
            check_not_importing(function.__qualname__)
            configure_tracing("dynamo-grpc-worker")
            async with DistributedRuntime(**settings) as runtime, contextlib.AsyncExitStack() as stack:
                await _open_ports(runtime, stack)
                task = asyncio.ensure_future(function(runtime, *args, **kwargs))
                try:
                    with stop_signals(runtime, task):
                        return await task
                except asyncio.CancelledError:
                    if runtime.is_shutting_down and not is_being_cancelled():
                        return None
                    raise
                finally:
                    task.cancel()

        run.__dynamo_worker__ = True  # type: ignore[attr-defined]
        return run

    return decorate


#: A supervisor may pass a signal on that its whole group got: one that comes so soon is the same.
SAME_SIGNAL_S = 1.0


@contextlib.contextmanager
def stop_signals(runtime: DistributedRuntime, task: asyncio.Future[Any]) -> Any:
    """While inside, SIGTERM and SIGINT shut the runtime down; `task` is cancelled if it serves nothing."""
    loop = asyncio.get_running_loop()

    first_at: float | None = None

    def stop(number: int) -> None:
        nonlocal first_at
        if first_at is not None and loop.time() - first_at > SAME_SIGNAL_S:
            os._exit(128 + number)
        if first_at is None:
            first_at = loop.time()
        runtime.shutdown()
        if not runtime.is_serving:
            task.cancel()

    dump.install(lambda: map(str, runtime.server.requests))
    signals = (signal.SIGTERM, signal.SIGINT)
    try:
        for number in signals:
            loop.add_signal_handler(number, stop, number)
    except (NotImplementedError, RuntimeError, ValueError):  # no main thread, or Windows: the caller's signals stay
        yield
        return
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
