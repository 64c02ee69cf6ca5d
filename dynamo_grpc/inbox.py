"""The client's side of a delivery: one Deliver call for each worker, and each request's outputs, merged by sequence.

Outputs come in the shared frames of the Deliver call, or on the request's own call: before the delivery is open, after
it broke, or because the worker has none. The request's inbox puts both in order.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import uuid
from collections.abc import Callable
from typing import Any

import grpc

from dynamo_grpc.errors import HandlerEndedError, HandlerOutputError, MeshError, SlowReaderError
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2

logger = logging.getLogger(__name__)

#: How long outputs that the call's end has counted may still be on their way.
_LATE_S = 5.0
#: A reader that leaves this much unread loses its stream: there is no flow control for one request of many.
MAX_UNREAD_BYTES = 1024 * 1024
#: What an unread token counts: an int and its place in a list.
_TOKEN_BYTES = 40
#: A worker that has no Deliver is asked again after this long.
_UNIMPLEMENTED_S = 60.0

#: Takes outputs; returns whether it takes more.
Sink = Callable[[list[Any]], bool]


def _stop(outputs: list[Any]) -> bool:
    return False


def delivered_message(
    output: inference_pb2.DeliveredOutput,
) -> inference_pb2.GenerateResponse | endpoint_pb2.CallResponse:
    """The message in a frame's output."""
    if output.HasField("response"):
        return output.response
    return endpoint_pb2.CallResponse.FromString(output.call_response)


class Inbox:
    """Outputs of one request that arrived and weren't taken yet.

    An output is a message, or an int: one more token of choice 0 and nothing else.

    Attributes:
        has_given: whether the reader was given one.
        has_lane: outputs may come by the delivery: what is missing may be on its way there.
        on_broken: called when it ends by itself: too much is unread, or a number is wrong.
    """

    def __init__(self) -> None:
        self.has_lane = False
        self._ready: list[Any] = []
        self._num_bytes = 0  # by the lane
        self._num_own = self._num_own_bytes = 0
        self._late: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        self._has_reader = True
        self.has_given = False
        self.is_ended = False
        self.error: BaseException | None = None
        self.on_broken: Callable[[], object] | None = None
        self._sink: Sink = _stop
        self._waiter: asyncio.Future[bool] | None = None
        self._early: dict[int, Any] = {}
        self._expected = 0
        self._is_numbered = False
        self._num_by_lane = 0
        self._wanted: int | None = None

    @property
    def num_arrived(self) -> int:
        """Outputs that have come, in order."""
        return self._expected

    @property
    def has_unread(self) -> bool:
        """Whether outputs wait for the reader."""
        return bool(self._ready)

    def put(self, message: Any) -> None:
        """Take an output of the request's own call; `wait_room` before the next."""
        if not self._has_reader:
            return
        self._num_own_bytes += message.ByteSize()
        self._num_own += 1
        sequence = getattr(message, "sequence", 0)  # an answer in one message has none
        if sequence == 0 and self._expected and not (self._is_numbered or self._num_by_lane):
            # a worker that doesn't number its outputs sends 0 for all; those that do are held to it
            self._expected += 1
            self._ready.append(message)
        else:
            self._is_numbered = self._is_numbered or sequence > 0
            self._order(sequence, message)
        self.wake()

    def put_by_lane(self, sequence: int, output: Any, num_bytes: int = _TOKEN_BYTES) -> bool:
        """Take an output of the delivery; gives whether the reader has to be woken."""
        if not self._has_reader:
            return False
        had_none = not self._ready
        self._num_by_lane += 1
        self._num_bytes += num_bytes
        if sequence == self._expected and not self._early:
            self._ready.append(output)
            self._expected = sequence + 1
        else:
            self._order(sequence, output)
        if self._num_by_lane == self._wanted:
            self.end(None)
        elif self._num_bytes > MAX_UNREAD_BYTES:
            self._break(SlowReaderError(f"{self._num_bytes} bytes of outputs are unread: the reader is too slow"))
        return had_none

    def _order(self, sequence: int, output: Any) -> None:
        if sequence == self._expected:
            self._ready.append(output)
            self._expected += 1
            while self._early and self._expected in self._early:
                self._ready.append(self._early.pop(self._expected))
                self._expected += 1
        elif sequence < self._expected or sequence in self._early:
            if self._num_own and self._num_by_lane:
                return  # it has come by the other way already
            self._break(HandlerOutputError(f"the worker gave output {sequence} twice: nothing it gives can be trusted"))
        elif not self.has_lane:
            what = f"output {sequence} came after {self._expected - 1}"
            self._break(HandlerOutputError(f"{what}: the worker left some out"))
        else:
            self._early[sequence] = output
            if len(self._early) == 1:
                asyncio.get_running_loop().call_later(_LATE_S, self._check_early, self._expected)

    def _check_early(self, expected: int) -> None:
        """An output was missing a while ago: by now it has come, or it never will."""
        if not self._early or self.is_ended:
            return
        if self._expected == expected:
            self._break(HandlerEndedError(f"an output was lost: number {expected} never came"))
        else:
            asyncio.get_running_loop().call_later(_LATE_S, self._check_early, self._expected)

    def _break(self, error: MeshError) -> None:
        on_broken = self.on_broken
        self.end(error)
        if on_broken is not None:
            on_broken()

    def end_of_call(self, num_by_lane: int, error: BaseException | None) -> None:
        """The call has ended, and says how many outputs went by the lane: those may still be on their way."""
        if self._num_by_lane >= num_by_lane:
            self.end(error)
            return
        self._wanted, self.error = num_by_lane, error
        self._late = asyncio.get_running_loop().call_later(_LATE_S, self.end, None)

    def end(self, error: BaseException | None) -> None:
        """Nothing more comes."""
        if self.is_ended:
            return
        self.is_ended = True
        self.on_broken = None
        if self._late is not None:
            self._late.cancel()  # it would keep all of the request for its time
        self.error = self.error or error
        if self.error is None and (self._early or self._num_by_lane < (self._wanted or 0)):
            self.error = HandlerEndedError(f"an output was lost: number {self._expected} never came")
        self.wake()

    def wake(self) -> None:
        """Give the reader what is there."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            if self._ready and not self._sink(self._take()):
                waiter.set_result(False)
            elif self.is_ended:
                waiter.set_result(True)
        except Exception as error:  # the reader's own: it is raised where the reader waits
            waiter.set_exception(error)

    def _take(self) -> list[Any]:
        self.has_given = True
        ready, self._ready, self._num_bytes = self._ready, [], 0
        if self._num_own_bytes:
            self._make_room()
        return ready

    async def wait_room(self) -> None:
        """Return when the reader has taken enough of the call's own outputs: gRPC holds back the others meanwhile."""
        while self._num_own_bytes > MAX_UNREAD_BYTES:
            self._room = asyncio.get_running_loop().create_future()
            await self._room

    def leave(self) -> None:
        """The reader takes no more: what still comes is dropped."""
        self._has_reader = False
        self._make_room()

    def _make_room(self) -> None:
        self._num_own_bytes = 0
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    async def read(self, sink: Sink) -> bool:
        """Give `sink` what is there, and again what comes, until it returns False.

        It is called from wherever outputs arrive: showing them costs no turn of a task.

        Returns:
            True when all was read and no more will come; False when `sink` returned it.
        """
        if self._ready and not sink(self._take()):
            return False
        if self.is_ended:
            return True
        self._sink = sink
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            return await self._waiter
        finally:
            self._waiter, self._sink = None, _stop


class LaneClient:
    """The Deliver call to one worker, opened again when it breaks.

    Attributes:
        name: of the delivery, when it is open; requests name it in their metadata.
        has_answered: whether the worker has said if it has deliveries.
    """

    def __init__(self, stub: Any, address: str) -> None:
        self._stub = stub
        self.name = ""
        self.has_answered = False
        self._ids = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"delivery {address}")

    def open_inbox(self, inbox: Inbox) -> int:
        """Give an inbox a number under which its outputs come."""
        delivery_id = next(self._ids)
        self._inboxes[delivery_id] = inbox
        return delivery_id

    def close_inbox(self, delivery_id: int) -> None:
        """Drop what still comes."""
        self._inboxes.pop(delivery_id, None)

    async def _run(self) -> None:
        backoff_s = 0.1
        while True:
            name = uuid.uuid4().hex
            call = self._stub.Deliver(inference_pb2.DeliverRequest(delivery=name), wait_for_ready=True)
            try:
                await call.initial_metadata()
                self.name, self.has_answered, backoff_s = name, True, 0.1
                while (frame := await call.read()) is not grpc.aio.EOF:
                    self._dispatch(frame)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self.has_answered, backoff_s = True, _UNIMPLEMENTED_S
            except Exception:  # without it, all outputs would come on their own calls for ever
                logger.exception("a delivery broke, opening another one")
            finally:
                self.name = ""
                call.cancel()
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, 5.0) if backoff_s < _UNIMPLEMENTED_S else 0.1

    def _dispatch(self, frame: inference_pb2.DeliverFrame) -> None:
        inboxes = self._inboxes  # a request that isn't there any more has no reader
        woken: list[Inbox] = []  # at the end, so that each reader gets all of the frame at once
        for output in frame.outputs:
            if inbox := inboxes.get(output.id):
                message = delivered_message(output)
                if inbox.put_by_lane(message.sequence, message, output.ByteSize()):
                    woken.append(inbox)
        tokens = frame.tokens
        for delivery_id, sequence, token_id in zip(tokens.ids, tokens.sequences, tokens.token_ids, strict=False):
            if (inbox := inboxes.get(delivery_id)) and inbox.put_by_lane(sequence, token_id):
                woken.append(inbox)
        for inbox in woken:
            inbox.wake()

    async def close(self) -> None:
        """End the call."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
