"""What once went wrong."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dynamo_grpc import (
    Context,
    InternalError,
    InvalidRequestError,
)
from dynamo_grpc.testing import Mesh
from dynamo_grpc.v1 import (
    endpoint_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)

from ..conftest import both_lanes, eventually
from .handlers import NAME, Endless, collect, echo, served_key, to_json, toy

pytestmark = both_lanes


async def test_one_of_two_endpoints_that_ends_early_holds_nobody_up(mesh: Mesh) -> None:
    runtime = mesh.runtime()
    a = asyncio.ensure_future(runtime.endpoint("test.backend.a").serve_endpoint(echo))
    b = asyncio.ensure_future(runtime.endpoint("test.backend.b").serve_endpoint(echo))
    client_a, client_b = await mesh.client("test.backend.a"), await mesh.client("test.backend.b")
    a.cancel()
    await asyncio.gather(a, return_exceptions=True)
    await eventually(lambda: not client_a.instances())
    assert await collect(await client_b.generate([1])) == [1]
    runtime.shutdown()
    await asyncio.wait_for(b, 5)


async def test_a_handler_that_never_awaits_can_be_cancelled(mesh: Mesh) -> None:
    steps = []

    async def busy(request: Any) -> AsyncIterator[int]:
        while True:
            steps.append(1)
            yield 5

    runtime = await mesh.serve(NAME, busy, toy(context_length=10**9))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{runtime.server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GenerateOnce(inference_pb2.PreprocessedRequest(token_ids=[1]), timeout=0.2)
        await eventually(lambda: not runtime.server.requests)
        count = len(steps)
        await asyncio.sleep(0.1)
        assert len(steps) == count


@pytest.mark.parametrize("request_id", ["plain", "räksmörgås", "x" * 300])
async def test_a_stop_that_overtakes_its_request_is_not_lost(mesh: Mesh, request_id: str) -> None:
    endless = Endless()
    await mesh.serve(NAME, endless.generate)
    client, context = await mesh.client(NAME), Context(request_id)
    stream = await client.generate(None, context=context)
    context.stop_generating()
    await asyncio.wait_for(collect(stream), 5)
    assert endless.how == "stopped"


@pytest.mark.parametrize("text", ["x" * 5000, "中" * 2000, "\ud800 a lone surrogate"])
async def test_any_text_of_an_error_arrives_with_its_status(mesh: Mesh, text: str) -> None:
    async def handler(request: Any) -> AsyncIterator[int]:
        raise InvalidRequestError(text, param="x")
        yield 1

    await mesh.serve(NAME, handler)
    with pytest.raises(InvalidRequestError) as caught:
        await collect(await (await mesh.client(NAME)).generate(None))
    assert caught.value.param == "x"
    assert caught.value.message[:100] == text[:100].replace("\ud800", "?")


async def test_the_text_of_a_plain_servicers_exception_is_not_for_clients(mesh: Mesh) -> None:
    class Plain(endpoint_pb2_grpc.EndpointServicer):
        async def Call(self, request: Any, context: Any) -> Any:  # type: ignore[override]
            raise KeyError("secret")
            yield

    server = grpc.aio.server()
    endpoint_pb2_grpc.add_EndpointServicer_to_server(Plain(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    runtime = await mesh.serve(NAME, echo)
    instance = runtime.server.served[NAME].instance
    instance.address = f"127.0.0.1:{port}"
    await runtime._registrations.copy().pop().update({served_key(runtime.server.served[NAME]): to_json(instance)})
    client = await mesh.client(NAME)
    await eventually(lambda: client.instances()[0].address.endswith(str(port)))
    with pytest.raises(InternalError) as caught:
        await collect(await client.generate(None))
    assert "secret" not in str(caught.value)
    await server.stop(None)


async def test_a_refused_worker_serves_no_client_of_the_library(mesh: Mesh) -> None:
    async def first(request: Any) -> AsyncIterator[int]:
        yield 1

    async def second(request: Any) -> AsyncIterator[int]:
        yield 2

    await mesh.serve(NAME, first, toy(100))
    refused = await mesh.serve(NAME, second, toy(200))
    await eventually(lambda: refused.server.served[NAME].refused_because)
    client = await mesh.client(NAME)
    await eventually(lambda: len(client.instances()) == 2)
    for _ in range(6):
        items = await collect(await client.generate([5]))
        assert items[0]["token_ids"] == [1]


async def test_closing_twice_and_late_is_fine(mesh: Mesh) -> None:
    await mesh.serve(NAME, echo)
    async with mesh.runtime() as runtime:
        async with await runtime.endpoint(NAME).client() as client:
            await client.wait_for_instances(5)
            stream = await client.generate([1, 2])
    await stream.aclose()


async def test_a_handler_that_blocks_the_loop_is_named_once(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    async def sleepy(request: Any) -> AsyncIterator[int]:
        for number in range(3):
            time.sleep(0.25)
            yield number

    await mesh.serve(NAME, sleepy)
    client = await mesh.client(NAME)
    with caplog.at_level(logging.WARNING):
        assert await collect(await client.generate(None)) == [0, 1, 2]
    told = [record.getMessage() for record in caplog.records if "blocks the event loop" in record.getMessage()]
    assert len(told) == 1
    assert "sleepy" in told[0]
    assert Path(__file__).name in told[0]
