"""The server's side of a delivery: outputs of all requests of one client process, in shared frames.

A gRPC message costs 20 to 30 µs on either side whatever it holds. So what becomes ready in one turn of the loop leaves
in one frame of the client's Deliver call, and while a write is pending, more gathers: that is the coalescing. There is
no timer: an idle stream waits for nothing.
"""

from __future__ import annotations

import asyncio
import collections
import time
from typing import Any

from google.protobuf.message import Message

from dynamo_grpc.v1 import endpoint_pb2, inference_pb2

#: A frame takes no more outputs when it has this many bytes: small, so that a first output waits for little.
FRAME_BYTES = 16 * 1024
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
        self._ready: collections.deque[inference_pb2.DeliveredOutput] = collections.deque()
        self._wake = asyncio.Event()
        self._room = asyncio.Event()

    def put(self, delivery_id: int, message: Message, *, is_first: bool = False) -> None:
        """Send an output with the next frame that has room; a request's first output goes before all that waits."""
        if isinstance(message, inference_pb2.GenerateResponse):
            output = inference_pb2.DeliveredOutput(id=delivery_id, response=message)
        else:
            output = inference_pb2.DeliveredOutput(id=delivery_id, call_response=message.SerializeToString())
        (self._first if is_first else self._ready).append(output)
        self._wake.set()

    async def wait_room(self) -> None:
        """Return when the client has taken enough."""
        while self.is_open and self.is_full:
            self._room.clear()
            await self._room.wait()

    @property
    def is_full(self) -> bool:
        """Whether `wait_room` would wait."""
        return len(self._ready) > MAX_PENDING

    def take_back(self, delivery_id: int) -> list[inference_pb2.DeliveredOutput]:
        """Outputs of a request that no frame has taken, after the lane has closed."""
        waiting = [*self._first, *self._ready]
        self._first = [output for output in self._first if output.id != delivery_id]
        self._ready = collections.deque(output for output in self._ready if output.id != delivery_id)
        return [output for output in waiting if output.id == delivery_id]

    def finish(self) -> None:
        """Send what is there, then end the Deliver call."""
        self._is_finishing = True
        self._wake.set()

    async def run(self, call: Any) -> None:
        """Write frames until the lane is finished or the call breaks."""
        try:
            await call.send_initial_metadata(())  # tells the client that the lane is there
            while self._first or self._ready or not self._is_finishing:
                await self._wake.wait()
                self._wake.clear()
                while self._first or self._ready:
                    self.turn += 1
                    await call.write(self._next_frame())
                    self._room.set()
        finally:
            self.is_open = False
            self._room.set()

    def _next_frame(self) -> inference_pb2.DeliverFrame:
        """What leaves next, FRAME_BYTES at most (a larger output has a frame to itself)."""
        first, self._first = self._first, []
        frame, size = inference_pb2.DeliverFrame(outputs=first), sum(output.ByteSize() for output in first)
        ready = self._ready
        while ready:
            size += ready[0].ByteSize()
            if size > FRAME_BYTES and frame.outputs:
                break
            frame.outputs.append(ready.popleft())
        return frame


class Sender:
    """Sends one request's outputs: by its client's lane while there is one, else on its own call.

    Attributes:
        num_by_lane: how many went by the lane; the call's trailer tells it.
    """

    def __init__(self, call: Any, lane: Lane | None, delivery_id: int) -> None:
        self._call, self._lane, self._id = call, lane, delivery_id
        self.num_by_lane = 0
        self._turn = -1
        self._count = 0
        self._since = 0.0

    async def send(self, message: Message) -> None:
        """Send the next output. The loop gets a turn now and then, also if the handler never awaits."""
        lane = self._lane
        if lane is None:
            await self._call.write(message)
            return
        if not lane.is_open:
            await self._leave_lane(lane)
            await self._call.write(message)
            return
        lane.put(self._id, message, is_first=self.num_by_lane == 0)
        self.num_by_lane += 1
        if self._turn != lane.turn:  # a frame was begun since: the loop has had a turn
            self._turn, self._count, self._since = lane.turn, 0, time.perf_counter()
        self._count += 1
        if lane.is_full:
            await lane.wait_room()
        elif (
            self.num_by_lane == 1
            or self._count >= _TURN_OUTPUTS
            or (self._count > 1 and time.perf_counter() - self._since > _TURN_S)
        ):
            self._count = 0
            await asyncio.sleep(0)

    async def finish(self) -> None:
        """See that nothing stays behind in a lane that has closed."""
        if self._lane is not None and not self._lane.is_open:
            await self._leave_lane(self._lane)

    async def _leave_lane(self, lane: Lane) -> None:
        self._lane = None
        for output in lane.take_back(self._id):
            self.num_by_lane -= 1
            if output.WhichOneof("output") == "response":
                await self._call.write(output.response)
            else:
                await self._call.write(endpoint_pb2.CallResponse.FromString(output.call_response))
