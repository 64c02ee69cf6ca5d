"""The server's side of a delivery: outputs of all requests of one client process, in shared frames.

A gRPC message costs 20 to 30 µs on either side whatever it holds. So what becomes ready in one turn of the loop leaves
in one frame of the client's Deliver call, and while a write is pending, more gathers: that is the coalescing. There is
no timer: an idle stream waits for nothing. A single token, the commonest output, travels as a row of three numbers:
making, packing and reading a message for each would cost more than everything else the worker does for it.
"""

from __future__ import annotations

import asyncio
import collections
import time
from typing import Any

import grpc
from google.protobuf.message import Message

from dynamo_grpc.errors import RequestCancelledError
from dynamo_grpc.inbox import delivered_message
from dynamo_grpc.metadata import QUEUED
from dynamo_grpc.v1 import endpoint_pb2, inference_pb2

#: A frame takes so many bytes of messages and so many single tokens: small, so that a first output waits for little.
FRAME_BYTES = 16 * 1024
FRAME_TOKENS = 512
#: Handlers wait while this many outputs wait for a client that doesn't read.
MAX_PENDING = 10_000
#: A handler that never awaits gives the loop a turn after so many outputs, or so much time.
_TURN_OUTPUTS = 16
_TURN_S = 0.001


class Lane:
    """Outputs that became ready since the last frame.

    Attributes:
        turn: goes up when a frame is begun: the loop has had a turn.
        is_open: False once the Deliver call has ended; outputs then go on their own calls.
    """

    def __init__(self) -> None:
        self.turn = 0
        self.is_open = True
        self._is_finishing = False
        self._first: list[inference_pb2.DeliveredOutput] = []
        self._messages: collections.deque[inference_pb2.DeliveredOutput] = collections.deque()
        self._token_rows: list[tuple[int, int, int]] = []  # delivery id, sequence, token id
        self._wake = asyncio.Event()
        self._room = asyncio.Event()

    def put(self, delivery_id: int, message: Message, *, is_first: bool = False) -> None:
        """Send an output with the next frame that has room; a request's first output goes before all that waits."""
        if isinstance(message, inference_pb2.GenerateResponse):
            output = inference_pb2.DeliveredOutput(id=delivery_id, response=message)
        else:
            output = inference_pb2.DeliveredOutput(id=delivery_id, call_response=message.SerializeToString())
        (self._first if is_first else self._messages).append(output)
        self._wake.set()

    def put_token(self, delivery_id: int, sequence: int, token_id: int) -> None:
        """Send an output that is one more token of choice 0 and nothing else."""
        self._token_rows.append((delivery_id, sequence, token_id))
        if len(self._token_rows) == 1:
            self._wake.set()

    async def wait_room(self) -> None:
        """Return when the client has taken enough."""
        while self.is_open and self.is_full:
            self._room.clear()
            await self._room.wait()

    @property
    def is_full(self) -> bool:
        """Whether `wait_room` would wait."""
        return len(self._token_rows) + len(self._messages) > MAX_PENDING

    @property
    def has_outputs(self) -> bool:
        """Whether something waits for a frame."""
        return bool(self._token_rows or self._messages or self._first)

    def take_back(self, delivery_id: int) -> list[inference_pb2.GenerateResponse | endpoint_pb2.CallResponse]:
        """Outputs of a request that no frame has taken, after the lane has closed; in order."""
        outputs = (*self._first, *self._messages)
        messages = [delivered_message(output) for output in outputs if output.id == delivery_id]
        messages += [token_response(row[1], row[2]) for row in self._token_rows if row[0] == delivery_id]
        self._first = [output for output in self._first if output.id != delivery_id]
        self._messages = collections.deque(output for output in self._messages if output.id != delivery_id)
        self._token_rows = [row for row in self._token_rows if row[0] != delivery_id]
        return sorted(messages, key=lambda message: message.sequence)

    def finish(self) -> None:
        """Send what is there, then end the Deliver call."""
        self._is_finishing = True
        self._wake.set()

    async def run(self, call: Any) -> None:
        """Write frames until the lane is finished or the call breaks."""
        try:
            await call.send_initial_metadata(())  # tells the client that the lane is there
            while self.has_outputs or not self._is_finishing:
                await self._wake.wait()
                self._wake.clear()
                while self.has_outputs:
                    self.turn += 1
                    await call.write(self.next_frame())
                    self._room.set()
        finally:
            self.is_open = False
            self._room.set()

    def next_frame(self) -> inference_pb2.DeliverFrame:
        """Take what leaves next: FRAME_BYTES of messages, but all the first ones, and FRAME_TOKENS tokens."""
        first, self._first = self._first, []
        frame, size = inference_pb2.DeliverFrame(outputs=first), sum(output.ByteSize() for output in first)
        messages = self._messages
        while messages:
            size += messages[0].ByteSize()
            if size > FRAME_BYTES and frame.outputs:
                break
            frame.outputs.append(messages.popleft())
        if rows := self._token_rows[:FRAME_TOKENS]:
            del self._token_rows[:FRAME_TOKENS]
            ids, sequences, token_ids = zip(*rows, strict=True)
            tokens = frame.tokens
            tokens.ids.extend(ids)
            tokens.sequences.extend(sequences)
            tokens.token_ids.extend(token_ids)
        return frame


def token_response(sequence: int, token_id: int) -> inference_pb2.GenerateResponse:
    """The message of an output that is one more token of choice 0."""
    return inference_pb2.GenerateResponse(
        sequence=sequence, choices=(inference_pb2.ChoiceDelta(token_ids=(token_id,)),)
    )


class Sender:
    """Sends one request's outputs: by its client's lane while there is one, else on its own call.

    Attributes:
        num_by_lane: how many went by the lane; the call's trailer tells it.
        num_unwanted: tokens that came after `close`.
    """

    def __init__(self, call: Any, lane: Lane | None, delivery_id: int) -> None:
        self._call, self._lane, self._id = call, lane, delivery_id
        self._is_closed = self._is_writing = False
        self._ending: asyncio.Task[None] | None = None
        self.num_unwanted = 0
        self.num_by_lane = 0
        self._turn = -1
        self._count = 0
        self._since = 0.0
        self._unsent: Message | None = None

    @property
    def is_writing(self) -> bool:
        """Whether an output waits for the client to take it."""
        return self._is_writing

    async def send(self, message: Message) -> None:
        """Send the next output. The loop gets a turn now and then, also if the handler never awaits.

        A large one goes on the call itself, whose own flow control holds it back from a slow reader.
        """
        lane = self._lane
        if lane is None or not lane.is_open or message.ByteSize() > FRAME_BYTES:
            self.check_open(message)
            await self.finish()
            await self._write(message)
            return
        lane.put(self._id, message, is_first=self.num_by_lane == 0)
        if not self._may_go_on(lane):
            await self.rest()

    def put_token(self, sequence: int, token_id: int) -> bool:
        """As `send`, for an output that is one more token of choice 0 and nothing else.

        Returns:
            False when `rest` must be awaited before the next output.
        """
        lane = self._lane
        if lane is None or not lane.is_open:
            self._unsent = token_response(sequence, token_id)
            return False
        lane.put_token(self._id, sequence, token_id)
        return self._may_go_on(lane)

    def _may_go_on(self, lane: Lane) -> bool:
        self.num_by_lane += 1
        if self._turn != lane.turn:  # a frame was begun since: the loop has had a turn
            self._turn, self._count, self._since = lane.turn, 1, time.perf_counter()
            return self.num_by_lane > 1 and not lane.is_full
        self._count += 1
        return self._count < _TURN_OUTPUTS and time.perf_counter() - self._since < _TURN_S and not lane.is_full

    async def rest(self) -> None:
        """Let the client, or the rest of the process, catch up."""
        if self._unsent is not None:
            message, self._unsent = self._unsent, None
            await self.send(message)
        elif self._lane is not None and self._lane.is_full:
            await self._lane.wait_room()
        else:
            self._count = 0
            await asyncio.sleep(0)

    async def tell_queued(self) -> None:
        """The request waits for its turn: its client shouldn't take that for silence."""
        await self._call.send_initial_metadata(((QUEUED, "1"),))

    def close(self) -> None:
        """The request was cancelled: nobody takes outputs any more, and giving one ends the handler."""
        self._is_closed = True
        self._lane = None

    def check_open(self, message: Message) -> None:
        """End the handler if nobody takes outputs any more."""
        if self._is_closed:
            if isinstance(message, inference_pb2.GenerateResponse):
                self.num_unwanted += sum(len(delta.token_ids) for delta in message.choices)
            raise asyncio.CancelledError

    def cancel(self, task: asyncio.Task[None]) -> None:
        """End the task that sends, but not in a write: gRPC still has that one, and takes no status beside it."""
        if self._is_writing:
            self._ending = task
        else:
            task.cancel()

    async def _write(self, message: Message) -> None:
        self._is_writing = True
        try:
            await self._call.write(message)
        except grpc.aio.InternalError:  # the call has ended, and its cancel hasn't come through yet
            raise RequestCancelledError("the client went away") from None
        finally:
            self._is_writing = False
            task, self._ending = self._ending, None
            if task is not None:
                task.cancel()

    async def finish(self) -> None:
        """See that nothing stays behind in a lane that has closed."""
        lane = self._lane
        if lane is not None and not lane.is_open:
            self._lane = None
            for message in lane.take_back(self._id):
                self.num_by_lane -= 1
                await self._write(message)
