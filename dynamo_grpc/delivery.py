"""The stream of one request at one instance: open it, yield its outputs, end it.

Everything that travels between client and worker for a request goes through here: call, metadata, deadline, stop, kill,
sequence check, error mapping. Retries and routing belong to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc

from dynamo_grpc.connections import Connection, Connections
from dynamo_grpc.context import Context
from dynamo_grpc.errors import DeadlineError, HandlerEndedError, MeshError, RequestCancelledError
from dynamo_grpc.instances import Live
from dynamo_grpc.metadata import printable, to_metadata
from dynamo_grpc.status import from_rpc_error
from dynamo_grpc.v1 import control_pb2, endpoint_pb2, inference_pb2

logger = logging.getLogger(__name__)

M = TypeVar("M", inference_pb2.GenerateResponse, endpoint_pb2.CallResponse)

#: After a gentle stop, a stream that its reader left is cancelled only after this long.
GENTLE_S = 5.0


class OutputStream(Generic[M]):
    """An async iterator of outputs; it is a child of its context, and ends with it.

    Leaving it early (`aclose`, or the end of `async with`) cancels the call, unless the context was stopped: then the
    worker has GENTLE_S to end by itself.
    """

    def __init__(self, live: Live, call: Any, context: Context, connections: Connections, tasks: set[Any]) -> None:
        self.instance = live.instance
        self._call, self._context, self._tasks = call, context, tasks
        self._connection = connections.acquire(live.connection.address)
        self._connection.num_inflight += 1
        self._forget = functools.partial(_forget, connections, self._connection)
        self._num_received = 0
        self._is_closed = False
        context.link(self)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> M:
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            self._release()
            raise self._error(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            self._release()  # the call was cancelled, not we
            raise RequestCancelledError(f"request {self._context.id()} was killed") from None
        if message is grpc.aio.EOF:
            self._release()
            raise StopAsyncIteration
        self._check(message.sequence)
        return message  # type: ignore[no-any-return]

    def _check(self, sequence: int) -> None:
        # Workers that don't number their outputs send 0 for all; those that do are held to it.
        if sequence not in (0, self._num_received):
            what = "lost" if sequence > self._num_received else "doubled"
            raise HandlerEndedError(f"an output was {what}: expected number {self._num_received}, got {sequence}")
        self._num_received += 1

    def _error(self, error: grpc.aio.AioRpcError) -> MeshError:
        told = from_rpc_error(error)
        if isinstance(told, DeadlineError):
            return DeadlineError(f"request {self._context.id()} took longer than its time-out")
        return told

    def stop(self) -> None:
        """Ask the worker for a gentle end."""
        self._own(self._send_stop())

    def kill(self) -> None:
        """Cancel the call."""
        self._call.cancel()

    async def _send_stop(self) -> None:
        request = control_pb2.StopRequest(request_id=printable(self._context.id()))
        try:
            async with asyncio.timeout(GENTLE_S):
                wait_s = 0.01
                while not self._call.done():
                    answer = await self._connection.control.Stop(request, timeout=GENTLE_S)
                    if answer.found:
                        return
                    await asyncio.sleep(wait_s)  # the stop has overtaken its own request
                    wait_s *= 2
        except (grpc.aio.AioRpcError, TimeoutError):
            self._call.cancel()  # it knows no gentle end, or is gone

    def _own(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def aclose(self) -> None:
        """Leave the stream. Idempotent."""
        self._leave()

    def _leave(self) -> None:
        if self._is_closed:
            return
        if self._context.is_stopped() and not self._context.is_killed() and not self._call.done():
            self._is_closed = True
            self._own(_finish_gently(self._call, self._forget))
            self._context.unlink(self)
            return
        self._call.cancel()
        self._release()

    def _release(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            self._context.unlink(self)
            self._forget()

    def __del__(self) -> None:
        # A reader that broke out of a plain `async for` leaves no other trace; the worker must not go on for nobody.
        if not self._is_closed:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._leave()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def _forget(connections: Connections, connection: Connection) -> None:
    connection.num_inflight -= 1
    connections.release(connection)


async def _finish_gently(call: Any, forget: Callable[[], None]) -> None:
    """Read a stream that nobody reads any more to its end, so that the worker can end it by itself."""
    try:
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(GENTLE_S):
                while await call.read() is not grpc.aio.EOF:
                    pass
    finally:
        call.cancel()
        forget()


class Delivery:
    """Opens streams; owns the tasks that outlive them."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._tasks: set[asyncio.Task[None]] = set()

    def open_generate(
        self, live: Live, request: inference_pb2.PreprocessedRequest, context: Context
    ) -> OutputStream[inference_pb2.GenerateResponse]:
        """Send a request to a model."""
        return self._open(live, live.connection.inference.Generate, request, context)

    def open_call(
        self, live: Live, request: endpoint_pb2.CallRequest, context: Context
    ) -> OutputStream[endpoint_pb2.CallResponse]:
        """Send a request to an endpoint of any kind."""
        return self._open(live, live.connection.endpoint.Call, request, context)

    def _open(self, live: Live, method: Any, request: Any, context: Context) -> OutputStream[Any]:
        call = method(request, timeout=context.remaining_s(), metadata=to_metadata(context, live.instance_id))
        return OutputStream(live, call, context, self._connections, self._tasks)

    async def close(self) -> None:
        """End what is left behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
