"""The stream of one request at one instance: open it, yield its outputs, end it.

Everything that travels between client and worker for a request goes through here: call, delivery, metadata, deadline,
stop, kill, error mapping. Retries and routing belong to the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import grpc

from dynamo_grpc.cancelling import is_being_cancelled
from dynamo_grpc.connections import Connection, Connections
from dynamo_grpc.context import Context
from dynamo_grpc.errors import (
    DeadlineError,
    InstanceLostError,
    MeshError,
    RequestCancelledError,
    ResponseTimeoutError,
)
from dynamo_grpc.inbox import Inbox, Sink
from dynamo_grpc.instances import Live
from dynamo_grpc.metadata import (
    DELIVERY,
    DELIVERY_ID,
    FIRST_OUTPUT_S,
    NUM_BY_LANE,
    QUEUED,
    printable,
    to_metadata,
)
from dynamo_grpc.status import from_rpc_error, has_details
from dynamo_grpc.v1 import control_pb2, endpoint_pb2, inference_pb2

M = TypeVar("M", inference_pb2.GenerateResponse, endpoint_pb2.CallResponse, inference_pb2.EmbedResponse)

#: After a gentle stop, a stream that its reader left is cancelled only after this long.
GENTLE_S = 5.0
#: How long headers that are there take to be seen.
_HEADERS_S = 0.1


class OutputStream(Generic[M]):
    """The outputs of one request; it is a child of its context, and ends with it.

    Leaving it early (`aclose`) cancels the call, unless the context was stopped: then the
    worker has GENTLE_S to end by itself.
    """

    def __init__(
        self, live: Live, connection: Connection, call: Any, inbox: Inbox, context: Context, forget: Callable[[], None],
        own: Callable[[Any], None],
    ) -> None:  # fmt: skip
        self.instance = live.instance
        self._connection, self._call, self._inbox, self._context = connection, call, inbox, context
        self._forget, self._own = forget, own
        self._is_closed = False
        self._silence: asyncio.TimerHandle | None = None
        self._limits_s: tuple[float | None, float | None] = (None, None)
        self._num_seen, self._since, self._period_s = 0, 0.0, 0.0
        context.link(self)

    @property
    def has_output(self) -> bool:
        """Whether an output was read."""
        return self._inbox.has_given

    @property
    def error(self) -> BaseException | None:
        """How it failed, if it has."""
        return self._inbox.error

    async def read(self, sink: Sink) -> bool:
        """Give outputs to `sink` as they arrive, until it returns False; True says that the stream has ended.

        An int is one more token of a model's choice 0, and nothing else.

        Raises:
            MeshError: it has failed. What `sink` raises comes out as it is.
        """
        try:
            has_ended = await self._inbox.read(sink)
        except asyncio.CancelledError:  # the reader is cancelled: so is the request
            self._leave()
            raise
        if has_ended:
            self._release()
            if self._inbox.error is not None:
                raise self._inbox.error
        return has_ended

    def limit_silence(self, first_s: float | None, gap_s: float | None) -> None:
        """Fail when no output comes.

        It is looked at now and then, so that it costs nothing for an output: the gap is noticed a quarter too late at
        most.

        Args:
            first_s: how long the first output may take; None is without limit.
            gap_s: the same for each one after it.
        """
        if limits_s := [limit_s for limit_s in (first_s, gap_s) if limit_s is not None]:
            loop = asyncio.get_running_loop()
            self._limits_s, self._since, self._period_s = (first_s, gap_s), loop.time(), min(limits_s) / 4
            self._silence = loop.call_later(self._period_s, _look, weakref.ref(self))

    def _check_silence(self) -> None:
        loop = asyncio.get_running_loop()
        self._silence = None
        if self._inbox.is_ended:
            return
        now, num = loop.time(), self._inbox.num_arrived
        if num != self._num_seen or self._inbox.has_unread:  # what the reader leaves unread is not the worker's fault
            self._num_seen, self._since = num, now
        limit_s = self._limits_s[1 if num else 0]
        left_s = math.inf if limit_s is None else limit_s - (now - self._since)
        if limit_s is None and num:
            return
        if left_s <= 0:
            what = "no further output" if num else "no output"
            where = f"the worker at {self._connection.address}"
            error = ResponseTimeoutError(f"{where} gave {what} for {limit_s:g} s, though its connection stands")
            if num:
                self._fail(error)
            else:
                self._own(self._fail_unless_queued(error))
        else:
            self._silence = loop.call_later(min(self._period_s, left_s), _look, weakref.ref(self))

    async def _fail_unless_queued(self, error: MeshError) -> None:
        """A worker of ours that lets it wait for its turn says so; it then holds its handler to the limit itself."""
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError, asyncio.CancelledError):
            async with asyncio.timeout(_HEADERS_S):
                if any(key == QUEUED for key, _ in await self._call.initial_metadata() or ()):
                    self._limits_s = (None, self._limits_s[1])
                    self._silence = asyncio.get_running_loop().call_later(self._period_s, _look, weakref.ref(self))
                    return
        if not self._inbox.num_arrived:
            self._fail(error)

    def _fail(self, error: MeshError) -> None:
        self._inbox.end(error)
        self._call.cancel()

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

    async def aclose(self) -> None:
        """Leave the stream. Idempotent."""
        self._leave()

    def _leave(self) -> None:
        if self._is_closed:
            return
        if self._context.is_stopped() and not self._context.is_killed() and not self._call.done():
            self._is_closed = True
            self._inbox.leave()
            self._own(_finish_gently(self._call, self._forget))
            self._context.unlink(self)
            return
        self._call.cancel()
        self._inbox.leave()
        self._release()

    def _release(self) -> None:
        if not self._is_closed:
            self._is_closed = True
            if self._silence is not None:
                self._silence.cancel()
            self._context.unlink(self)
            self._forget()

    def __del__(self) -> None:
        # A reader that broke out of a plain `async for` leaves no other trace; the worker must not go on for nobody.
        if not self._is_closed:
            with contextlib.suppress(RuntimeError):  # the event loop has ended
                self._leave()


def _look(stream: weakref.ref[OutputStream[Any]]) -> None:
    """The timer of `limit_silence`: it must not keep a stream that its reader dropped."""
    if (alive := stream()) is not None:
        alive._check_silence()


async def _finish_gently(call: Any, forget: Callable[[], None]) -> None:
    """Let a call that nobody reads any more end by itself."""
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(call.code(), GENTLE_S)
    finally:
        call.cancel()
        forget()


async def _read_call(call: Any, inbox: Inbox, request_id: str, address: str) -> None:
    """Put what comes on the request's own call into its inbox, and say there how the call ended."""
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            inbox.put(message)
            await inbox.wait_room()
        inbox.end_of_call(_num_by_lane(await call.trailing_metadata()), None)
    except grpc.aio.AioRpcError as error:
        told = from_rpc_error(error)
        if isinstance(told, RequestCancelledError) and not has_details(error):
            # a server that stops ends calls so that it had not handed to anybody yet; a cancel of ours isn't seen here
            told = InstanceLostError("it ended the call without a word")
        if isinstance(told, DeadlineError):
            told = DeadlineError(f"request {request_id} took longer than its time-out")
        elif isinstance(told, InstanceLostError):
            told = InstanceLostError(f"the worker at {address} was lost: send the request again ({told.message})")
        inbox.end_of_call(_num_by_lane(error.trailing_metadata()), told)
    except asyncio.CancelledError:
        inbox.end(RequestCancelledError(f"request {request_id} was killed"))
        if is_being_cancelled():
            raise


def _num_by_lane(trailers: Any) -> int:
    return int(next((value for key, value in trailers or () if key == NUM_BY_LANE), "0"))


class Delivery:
    """Opens streams; owns the tasks that outlive them."""

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._tasks: set[asyncio.Task[None]] = set()

    def open_generate(
        self,
        live: Live,
        request: inference_pb2.PreprocessedRequest,
        context: Context,
        first_output_s: float | None = None,
    ) -> OutputStream[inference_pb2.GenerateResponse]:
        """Send a request to a model; the worker is told how long its first output may take."""
        return self._open(live, live.connection.inference.Generate, request, context, first_output_s)

    def open_call(
        self, live: Live, request: endpoint_pb2.CallRequest, context: Context
    ) -> OutputStream[endpoint_pb2.CallResponse]:
        """Send a request to an endpoint of any kind."""
        return self._open(live, live.connection.endpoint.Call, request, context)

    def open_embed(
        self, live: Live, request: inference_pb2.EmbedRequest, context: Context, first_output_s: float | None = None
    ) -> OutputStream[inference_pb2.EmbedResponse]:
        """Send a request to a model that makes vectors: a stream of one answer."""
        return self._open(live, live.connection.embed, request, context, first_output_s, has_lane=False)

    def _open(
        self,
        live: Live,
        method: Any,
        request: Any,
        context: Context,
        first_output_s: float | None = None,
        *,
        has_lane: bool = True,
    ) -> OutputStream[Any]:
        metadata = to_metadata(context, live.instance_id)
        if first_output_s is not None:
            metadata = (*metadata, (FIRST_OUTPUT_S, f"{first_output_s:g}"))
        connection = self._connections.acquire(live.connection.address)
        connection.num_inflight += 1
        inbox, delivery_id = Inbox(), 0
        if has_lane and connection.lane is not None and connection.lane.name:
            delivery_id, inbox.has_lane = connection.lane.open_inbox(inbox), True
            metadata = (*metadata, (DELIVERY, connection.lane.name), (DELIVERY_ID, str(delivery_id)))
        call = method(request, timeout=context.remaining_s(), metadata=metadata)
        inbox.on_broken = call.cancel
        self._own(_read_call(call, inbox, context.id(), connection.address))
        forget = functools.partial(_forget, self._connections, connection, delivery_id)
        return OutputStream(live, connection, call, inbox, context, forget, self._own)

    def _own(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """End what is left behind."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _forget(connections: Connections, connection: Connection, delivery_id: int) -> None:
    """A request's stream has ended or was left."""
    if connection.lane is not None and delivery_id:
        connection.lane.close_inbox(delivery_id)
    connection.num_inflight -= 1
    connections.release(connection)
