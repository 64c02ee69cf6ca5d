"""Instances come and go: loss, drain, restart."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from dynamo_grpc import (
    DrainingError,
    EngineShutdown,
    InstanceLostError,
    InvalidRequestError,
    NoInstancesError,
    RequestCancelledError,
)
from dynamo_grpc.connections import CHANNEL_OPTIONS
from dynamo_grpc.lifecycle import State
from dynamo_grpc.status import from_rpc_error
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import (
    control_pb2,
    control_pb2_grpc,
    endpoint_pb2,
    endpoint_pb2_grpc,
)

from ..conftest import both_lanes, eventually
from .handlers import NAME, Endless, collect, echo

pytestmark = both_lanes


async def test_a_lost_instance_is_left_before_the_first_output(mesh: Mesh) -> None:
    stuck = Endless(silent=True)
    lost = await mesh.serve(NAME, stuck.generate)
    client = await mesh.client(NAME)
    reading = asyncio.ensure_future(collect(await client.generate(["a", "b"])))
    await asyncio.wait_for(stuck.started.wait(), 2)
    await mesh.serve(NAME, echo)
    await eventually(lambda: len(client.instance_ids()) == 2)
    await mesh.lose(lost)
    assert await asyncio.wait_for(reading, 5) == ["a", "b"]
    await eventually(lambda: len(client.instance_ids()) == 1)
    for _ in range(5):
        assert await collect(await client.generate(["c"])) == ["c"]


async def test_a_lost_instance_is_told_after_the_first_output(mesh: Mesh) -> None:
    endless = Endless()
    lost = await mesh.serve(NAME, endless.generate)
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    stream = await client.direct(None, lost.instance_id)
    assert (await anext(stream)).data() == 0
    await mesh.lose(lost)
    with pytest.raises((InstanceLostError, RequestCancelledError)):
        await collect(stream)


async def test_engine_shutdown_takes_a_request_elsewhere(mesh: Mesh) -> None:
    async def leaving(request: Any) -> AsyncIterator[int]:
        raise EngineShutdown
        yield 1

    await mesh.serve(NAME, leaving)
    await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    for _ in range(6):
        assert await collect(await client.generate(["a"])) == ["a"]


async def test_a_client_errors_are_not_tried_elsewhere(mesh: Mesh) -> None:
    calls = []

    async def refusing(request: Any) -> AsyncIterator[int]:
        calls.append(1)
        raise ValueError("no")
        yield 1

    for _ in range(2):
        await mesh.serve(NAME, refusing)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instance_ids()) == 2)
    with pytest.raises(InvalidRequestError):
        await collect(await client.generate(None))
    assert len(calls) == 1


async def test_drain_finishes_what_runs_and_refuses_what_is_new(mesh: Mesh) -> None:
    release = asyncio.Event()

    async def slow(request: Any) -> AsyncIterator[int]:
        yield 1
        await release.wait()
        yield 2

    runtime = await mesh.serve(NAME, slow)
    client = await mesh.client(NAME)
    stream = await client.generate(None)
    assert (await anext(stream)).data() == 1
    stopping = asyncio.ensure_future(mesh.stop(runtime))
    await eventually(lambda: not client.instances())
    await eventually(lambda: runtime.server.lifecycle.state is State.DRAINING)
    address = f"127.0.0.1:{runtime.server.port}"
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in endpoint_pb2_grpc.EndpointStub(channel).Call(endpoint_pb2.CallRequest()):
                pass
    assert isinstance(from_rpc_error(caught.value), DrainingError)
    release.set()
    assert await collect(stream) == [2]
    await asyncio.wait_for(stopping, 5)


async def test_drain_by_control(mesh: Mesh) -> None:
    runtime = await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        await control_pb2_grpc.ControlStub(channel).Drain(control_pb2.DrainRequest())
        await eventually(lambda: not client.instances())
        await mesh._tasks[runtime]


async def test_a_client_survives_a_restart_of_its_server(mesh: Mesh) -> None:
    first = await mesh.serve(NAME, echo)
    client = await mesh.client(NAME)
    assert await collect(await client.generate([1])) == [1]
    await mesh.stop(first)
    with pytest.raises(NoInstancesError):
        await client.generate([1])
    await mesh.serve(NAME, echo)
    await client.wait_for_instances(5)
    assert await collect(await client.generate([2])) == [2]


async def test_two_endpoints_of_one_process(mesh: Mesh) -> None:
    async def other(request: Any) -> str:
        return "other"

    runtime = mesh.runtime()
    tasks = [
        asyncio.ensure_future(runtime.endpoint("test.backend.a").serve_endpoint(echo)),
        asyncio.ensure_future(runtime.endpoint("test.backend.b").serve_endpoint(other)),
    ]
    a, b = await mesh.client("test.backend.a"), await mesh.client("dyn://test.backend.b")
    assert await collect(await a.generate(["x"])) == ["x"]
    assert await collect(await b.generate(None)) == ["other"]
    assert a.instance_ids() == b.instance_ids()
    runtime.shutdown()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)


async def test_the_health_check_payload_must_give_an_output_first(mesh: Mesh) -> None:
    healthy = asyncio.Event()

    async def handler(request: Any) -> AsyncIterator[Any]:
        if request == "check":
            await healthy.wait()
        yield request

    runtime = mesh.runtime()
    serving = asyncio.ensure_future(runtime.endpoint(NAME).serve_endpoint(handler, health_check_payload="check"))
    client = await mesh.runtime().endpoint(NAME).client()
    with pytest.raises(NoInstancesError):
        await client.wait_for_instances(0.3)
    healthy.set()
    await client.wait_for_instances(5)
    runtime.shutdown()
    await serving
