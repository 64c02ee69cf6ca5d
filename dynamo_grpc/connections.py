"""Channels to workers, one for each address, and whether each is up.

A broken connection or a refused connect takes an instance out of routing at once, without waiting for its lease to
end; it is back when its address answers again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

import grpc

from dynamo_grpc.inbox import LaneClient
from dynamo_grpc.v1 import control_pb2_grpc, endpoint_pb2_grpc, inference_pb2, inference_pb2_grpc

#: Largest message in either direction, in bytes.
MAX_MESSAGE_BYTES = 64 * 1024 * 1024

#: Both ends ask whether the other one is there: it is gone when it is silent for 15 s, though nothing closed.
KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 5_000),  # grpc.keepalive_timeout_ms has no effect
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS = (
    *KEEPALIVE_OPTIONS,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # also the time-out of a connection attempt
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),  # a retry goes to another instance, so it is the client's
    ("grpc.enable_http_proxy", 0),
    # A small window: what the client has not read waits at the worker, where more shares a frame and first outputs
    # pass the others. Measured flat out, 64 streams: 32 KiB 103 k tokens/s and a first token after 63 ms, 4 KiB 148 k
    # and 25 ms. A message that is larger gets all the room it needs once it is being read.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4_096),
)


class Connection:
    """The channel to one address.

    Attributes:
        is_up: False after a connection broke or was refused, until one is there again.
    """

    def __init__(self, address: str, on_change: Callable[[], None], *, has_lane: bool) -> None:
        self.address = address
        self.is_up = True
        self.num_users = 0
        self.num_inflight = 0
        self.channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        # one message is a stream of one: so that it is read, and goes elsewhere, as a stream does
        self.embed = self.channel.unary_stream(
            "/dynamo_grpc.v1.Inference/Embed",
            request_serializer=inference_pb2.EmbedRequest.SerializeToString,
            response_deserializer=inference_pb2.EmbedResponse.FromString,
        )
        self.endpoint = endpoint_pb2_grpc.EndpointStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)
        self.lane = LaneClient(self.inference, address) if has_lane else None
        self._on_change = on_change
        self._task = asyncio.get_running_loop().create_task(self._follow(), name=f"connection {address}")

    async def _follow(self) -> None:
        was_ready = False
        while True:
            state = self.channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                was_ready = True
                self._set(is_up=True)
            elif was_ready or state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                self._set(is_up=False)
            await self.channel.wait_for_state_change(state)

    def _set(self, *, is_up: bool) -> None:
        if self.is_up != is_up:
            self.is_up = is_up
            self._on_change()

    async def close(self) -> None:
        """End the channel and all its calls."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self.lane:
            await self.lane.close()
        await self.channel.close()


class Connections:
    """All channels of a process, shared by its clients.

    Args:
        has_lanes: outputs come in shared frames where the worker can; default unless DYN_DELIVERY is 0.
    """

    def __init__(self, *, has_lanes: bool | None = None) -> None:
        self._has_lanes = os.environ.get("DYN_DELIVERY", "1") != "0" if has_lanes is None else has_lanes
        self._by_address: dict[str, Connection] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._callbacks: list[Callable[[], None]] = []

    def acquire(self, address: str) -> Connection:
        """The connection to `address`; give it back with `release`."""
        if address not in self._by_address:
            self._by_address[address] = Connection(address, self._changed, has_lane=self._has_lanes)
        connection = self._by_address[address]
        connection.num_users += 1
        return connection

    def release(self, connection: Connection) -> None:
        """Give a connection back; it is closed when nobody has it any more."""
        connection.num_users -= 1
        if connection.num_users == 0 and self._by_address.get(connection.address) is connection:
            del self._by_address[connection.address]
            task = asyncio.get_running_loop().create_task(connection.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call `callback` whenever a connection went up or down."""
        self._callbacks.append(callback)

    def unsubscribe(self, callback: Callable[[], None]) -> None:
        """Stop calling `callback`."""
        self._callbacks.remove(callback)

    def _changed(self) -> None:
        for callback in tuple(self._callbacks):
            callback()

    async def close(self) -> None:
        """Close all channels."""
        connections, self._by_address = list(self._by_address.values()), {}
        await asyncio.gather(*(connection.close() for connection in connections), *self._closing)
