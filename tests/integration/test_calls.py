"""Calls over real gRPC: values, routing, the server."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from dynamo_grpc import (
    NoInstancesError,
    RouterMode,
)
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import (
    control_pb2,
    control_pb2_grpc,
)

from ..conftest import both_lanes, eventually
from .handlers import NAME, Endless, collect, echo

pytestmark = both_lanes


async def test_values_of_all_kinds_travel(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    values = [1, 2.5, "text", True, None, {"a": [1, {"b": None}]}, []]
    assert await collect(await client.generate(values)) == values
    raw = await client.generate(values, annotated=False)
    assert [value async for value in raw] == values


async def test_bytes_travel_as_they_are(mesh: Mesh) -> None:
    async def reverse(request: bytes) -> bytes:
        return request[::-1]

    await mesh.serve(NAME, reverse)
    assert await collect(await (await mesh.client(NAME)).generate(b"\x00\xff")) == [b"\xff\x00"]


async def test_three_instances_share_the_load(mesh: Mesh) -> None:
    seen: list[int] = []
    for number in range(3):

        async def handler(request: Any, number: int = number) -> int:
            seen.append(number)
            return number

        await mesh.serve(NAME, handler)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 3)
    for _ in range(30):
        await collect(await client.round_robin(None))
    assert [seen.count(number) for number in range(3)] == [10, 10, 10]
    for instance_id in client.instance_ids():
        (one,) = await collect(await client.direct(None, instance_id))
        assert await collect(await client.direct(None, instance_id)) == [one]
    with pytest.raises(NoInstancesError, match="instance_id=5 not found"):
        await client.direct(None, 5)
    assert len(await collect(await client.random(None))) == 1


async def test_power_of_two_and_least_loaded_avoid_the_busy_one(mesh: Mesh) -> None:
    slow = Endless(silent=True)
    await mesh.serve(NAME, slow.generate)
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME, RouterMode.LeastLoaded)
    await eventually(lambda: len(client.instance_ids()) == 2)
    waiting = []
    while not slow.started.is_set():
        stream = await client.generate([])
        waiting.append(asyncio.ensure_future(collect(stream)))
        await asyncio.sleep(0.05)
    for _ in range(20):
        assert await collect(await client.generate([1])) == [1]
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_servicer_of_ones_own_beside_ours(mesh: Mesh) -> None:
    async def shout(request: bytes, context: Any) -> bytes:
        return request.upper()

    method = grpc.unary_unary_rpc_method_handler(shout)
    handler = grpc.method_handlers_generic_handler("my.package.Shout", {"Shout": method})
    runtime = mesh.runtime()
    runtime.server.add_servicer(lambda server: server.add_generic_rpc_handlers((handler,)), "my.package.Shout")
    serving = asyncio.ensure_future(runtime.endpoint(NAME).serve_endpoint(echo))
    client = await mesh.client(NAME)
    assert await collect(await client.generate([1])) == [1]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        assert await channel.unary_unary("/my.package.Shout/Shout")(b"hey") == b"HEY"
    runtime.shutdown()
    await serving


async def test_a_proxy_in_the_environment_is_not_asked(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    await mesh.serve(NAME, echo)
    assert await collect(await (await mesh.client(NAME)).generate([1])) == [1]


async def test_load_is_told_when_it_changes(mesh: Mesh) -> None:
    endless = Endless(silent=True)
    runtime = await mesh.serve(NAME, endless.generate)
    client = await mesh.client(NAME)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        request = control_pb2.WatchLoadRequest()
        request.min_interval.FromMilliseconds(10)
        loads = control_pb2_grpc.ControlStub(channel).WatchLoad(request)
        assert (await loads.read()).num_running == 0
        reading = asyncio.ensure_future(collect(await client.generate(None)))
        assert (await loads.read()).num_running == 1
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert (await loads.read()).num_running == 0
        loads.cancel()


@pytest.mark.full
async def test_a_stream_that_is_silent_for_45_s_lives(mesh: Mesh) -> None:
    async def slow(request: Any) -> AsyncIterator[int]:
        yield 1
        await asyncio.sleep(45)
        yield 2

    await mesh.serve(NAME, slow)
    assert await collect(await (await mesh.client(NAME)).generate(None)) == [1, 2]
